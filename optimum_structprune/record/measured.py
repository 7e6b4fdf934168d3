"""The printed result of `structprune evaluate`: sizes, quality and speed of several models side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

from .answers import FIGURES, paired, question_lines, sample_questions
from .figures import (
    AnswersResult,
    DomainResult,
    Figure,
    SizeResult,
    VectorResult,
    mean_figure,
    mean_ratio,
    ratios_of,
)
from .summary import FEW_DOCUMENTS, INTERVAL, MISSING_TEXT, UNITS, language_lines
from .table import MAX_DIGITS, UNKNOWN, aligned, byte_size, number, ratio_text, times, with_margin


if TYPE_CHECKING:
    from .evaluation import Evaluation, MeasuredModel, Measurement
    from .speed import Speed, Timing

Rows = list[list[str]]
NO_DOMAIN = DomainResult()


@dataclass(frozen=True)
class Column:
    """One model of the table.

    Attributes:
        model: Its measurements.
        evaluation: Its evaluation. For the original model, the evaluation of a model that is compared with it.
        is_original: Whether it is the original model, whose figures are called `dense`.
    """

    model: MeasuredModel
    evaluation: Evaluation | None
    is_original: bool

    def domain(self, name: str) -> DomainResult:
        """Return the result on a domain, which is empty if the model was not measured there."""
        if self.evaluation is None:
            return NO_DOMAIN
        return self.evaluation.domains.get(name, NO_DOMAIN)

    @property
    def answers(self) -> AnswersResult | None:
        """Return the answers of the evaluation."""
        if self.evaluation is None:
            return None
        return self.evaluation.answers

    def value(self, figure: Figure | None) -> float | None:
        """Return the value of this model."""
        if figure is None:
            return None
        if self.is_original:
            return figure.dense
        return figure.last

    def cell(self, figure: Figure | None) -> str:
        """Return the value of this model with its margin, if the margin belongs to the value."""
        value = self.value(figure)
        if figure is None or value is None:
            return UNKNOWN
        if figure.dense is not None:
            return number(value, MAX_DIGITS)
        return with_margin(value, figure.margin)


def measurement_lines(measurement: Measurement) -> list[str]:
    """Return the printed form of the measurements of several models."""
    lines = []
    table = measurement_table(measurement)
    if len(table) > 1:
        lines.append(aligned(table))

    lines += _notes(measurement)
    if measurement.speed is not None:
        lines.append(speed_note(measurement.speed))

    evaluations = measurement.evaluations
    if len(evaluations) == 1:
        (evaluation,) = evaluations.values()
        lines += [question_lines(question) for question in sample_questions(evaluation.answers)]

    for evaluation in evaluations.values():
        lines += [f"warning: {warning}" for warning in evaluation.warnings]
    return lines


def measurement_table(measurement: Measurement) -> Rows:
    """Return the table of all figures, with one column for each model."""
    models = measurement.columns()
    columns = _columns(measurement)

    rows = [_row("", list(models))]
    rows += _size_rows(columns)
    rows += _quality_rows(columns)
    rows += _answer_rows(columns)
    if measurement.speed is not None:
        rows += speed_rows(measurement.speed)
    return rows


def _columns(measurement: Measurement) -> list[Column]:
    """Return the models of the table. A model without an evaluation is the original model of the others."""
    evaluations = list(measurement.evaluations.values())
    columns = []

    for model in measurement.columns().values():
        is_original = model.evaluation is None
        evaluation = model.evaluation
        if is_original and evaluations:
            evaluation = evaluations[0]
        columns.append(Column(model, evaluation, is_original))

    return columns


def _row(label: str, cells: Iterable[str]) -> list[str]:
    """Return a row of the table."""
    row = [label]
    row.extend(cells)
    return row


def _size_rows(columns: Sequence[Column]) -> Rows:
    """Return the rows of widths, parameters and bytes."""
    rows: Rows = []

    kinds: dict[str, None] = {}
    for column in columns:
        kinds.update(dict.fromkeys(column.model.widths))
    for kind in kinds:
        widths = [column.model.widths.get(kind) for column in columns]
        rows.append(_row(UNITS.get(kind, kind), map(number, widths)))

    sizes = [column.model.size or SizeResult() for column in columns]
    if any(size.parameters for size in sizes):
        rows.append(_row("layers", (number(size.layers) for size in sizes)))
        rows.append(_row("parameters", (number(size.parameters or None) for size in sizes)))
        rows.append(_row("weights", (byte_size(size.bytes) for size in sizes)))

    if any(size.cache_per_token is not None for size in sizes):
        rows.append(_row("cache bytes per token", (number(size.cache_per_token) for size in sizes)))
    return rows


def _quality_rows(columns: Sequence[Column]) -> Rows:
    """Return the rows of perplexity, similarity to the original model, and vectors."""
    evaluations = _evaluations(columns)
    domains: dict[str, None] = {}
    for evaluation in evaluations:
        domains.update(dict.fromkeys(evaluation.domains))

    rows: Rows = []
    for name in domains:
        label = f"perplexity, {_domain_label(name, evaluations)}"
        rows.append(_row(label, (_perplexity_cell(column, name) for column in columns)))

    rows += _mean_rows(columns)
    rows += _bits_rows(columns, list(domains))

    for label, select in FIGURES_OF_DOMAIN.items():
        for name in domains:
            cells = [column.cell(select(column.domain(name))) for column in columns]
            rows.append(_row(f"{label}, {name}", cells))

    return [row for row in rows if any(cell not in ("", UNKNOWN) for cell in row[1:])]


def _evaluations(columns: Sequence[Column]) -> list[Evaluation]:
    """Return the evaluations of all models that have one."""
    return [column.evaluation for column in columns if column.evaluation is not None]


def _of_vectors(select: Callable[[VectorResult], Figure | None]) -> Callable[[DomainResult], Figure | None]:
    """Return a function that selects a figure of the vectors of a domain."""

    def select_figure(domain: DomainResult) -> Figure | None:
        return None if domain.vectors is None else select(domain.vectors)

    return select_figure


# The figures that have one row for each domain.
FIGURES_OF_DOMAIN: dict[str, Callable[[DomainResult], Figure | None]] = {
    "KL to the original": lambda domain: domain.divergence,
    "same most likely token": lambda domain: domain.agreement,
    "cosine": _of_vectors(lambda vectors: vectors.cosine),
    "cosine, 5th percentile": _of_vectors(lambda vectors: Figure(pruned=vectors.cosine_p5)),
    "cosine, lowest": _of_vectors(lambda vectors: Figure(pruned=vectors.cosine_worst)),
    "neighbours kept": _of_vectors(lambda vectors: vectors.neighbours),
    "translations found": _of_vectors(lambda vectors: vectors.retrieval),
}


def _domain_label(name: str, evaluations: Iterable[Evaluation]) -> str:
    """Return the name of a domain and, if it is known, whether the model was calibrated on this kind of text."""
    for evaluation in evaluations:
        if evaluation.calibrated is None:
            continue
        if evaluation.is_calibration_domain(name):
            return f"{name} (calibration domain)"
        return f"{name} (unseen)"
    return name


def _perplexity_cell(column: Column, name: str) -> str:
    """Return the perplexity on a domain, as a ratio to the original model if there is one."""
    domain = column.domain(name)
    figure = domain.perplexity

    if figure is None:
        return UNKNOWN
    if column.is_original:
        return number(figure.dense, 2)
    if figure.ratio is None:
        return with_margin(figure.last or 0.0, figure.margin, 2)
    return ratio_text(figure, domain.documents)


def _mean_rows(columns: Sequence[Column]) -> Rows:
    """Return the mean ratios over the domains, separately for calibration domains and unseen ones."""
    if all(evaluation.calibrated is None for evaluation in _evaluations(columns)):
        return _mean_row("domains", columns, lambda evaluation, name: True)

    rows = _mean_row("calibration domains", columns, lambda evaluation, name: evaluation.is_calibration_domain(name))
    rows += _mean_row("unseen domains", columns, lambda evaluation, name: not evaluation.is_calibration_domain(name))
    return rows


def _mean_row(label: str, columns: Sequence[Column], selects: Callable[[Evaluation, str], bool]) -> Rows:
    """Return the mean ratio over the selected domains, or nothing if no model has two of them."""
    cells = []
    num_domains = 0

    for column in columns:
        figures: list[Figure] = []
        if column.evaluation is not None and not column.is_original:
            ratios = ratios_of(column.evaluation.domains)
            figures = [figure for name, figure in ratios.items() if selects(column.evaluation, name)]

        num_domains = max(num_domains, len(figures))
        if figures:
            mean, margin = mean_ratio(figures)
            cells.append(times(mean, margin))
        else:
            cells.append("")

    if num_domains < 2:
        return []
    return [_row(f"perplexity, mean over the {label}", cells)]


def _bits_rows(columns: Sequence[Column], domains: Sequence[str]) -> Rows:
    """Return the mean bits per byte over the domains."""
    cells = []
    for column in columns:
        figures = [column.domain(name).bits_per_byte for name in domains]
        mean = mean_figure(figure for figure in figures if figure is not None)
        cells.append(number(column.value(mean), MAX_DIGITS))

    return [_row("bits per byte, mean", cells)]


def _answer_rows(columns: Sequence[Column]) -> Rows:
    """Return the counts of correct, repetitive and finished answers, and the median length."""
    pairs = [(column, column.answers) for column in columns]
    if all(answers is None for _, answers in pairs):
        return []

    rows = []
    for name, word in FIGURES.items():
        rows.append(_row(f"answers {word}", (_count(column, answers, name) for column, answers in pairs)))
    lengths = [_median_length(column, answers) for column, answers in pairs]
    rows.append(_row("median length of an answer (tokens)", lengths))

    divergences: list[float | None] = []
    for column, answers in pairs:
        if answers is None or column.is_original:
            divergences.append(None)
        else:
            divergences.append(answers.divergence)
    if any(value is not None for value in divergences):
        rows.append(_row("KL to the original along its answers", (number(value, MAX_DIGITS) for value in divergences)))
    return rows


def _count(column: Column, answers: AnswersResult | None, name: str) -> str:
    """Return a count of answers of one model: `10 of 16 (worse, p = 0.030)`."""
    if answers is None:
        return UNKNOWN

    counts = answers.counts(name)
    total = len(answers.questions)
    if column.is_original:
        return f"{counts[0]} of {total}"
    if len(counts) < 2:
        return f"{counts[-1]} of {total}"

    comparison = paired(answers, name)
    return f"{counts[-1]} of {total} ({comparison.verdict}, p = {comparison.p_value:.3f})"


def _median_length(column: Column, answers: AnswersResult | None) -> str:
    """Return the median number of tokens of the answers of one model."""
    if answers is None:
        return UNKNOWN
    model = answers.models[0] if column.is_original else answers.models[-1]
    return number(median(answers.tokens(model)))


def speed_rows(speed: Speed) -> Rows:
    """Return tokens per second, the speed-up where its quartiles show one, and memory."""
    rows: Rows = []

    for word, stage in (("reading", speed.prefill), ("writing", speed.decode)):
        for shape, timings in stage.items():
            rates = [number(timing.tokens_per_second, 1) for timing in timings.values()]
            rows.append(_row(f"{word}, tokens/s, {shape}", rates))

            speedups = [_speedup(timing) for timing in timings.values()]
            if len(speedups) > 1:
                speedups[0] = UNKNOWN
                rows.append(_row(f"{word}, speed-up, {shape}", speedups))

    for shape, memory in speed.run_memory.items():
        rows.append(_row(f"memory, {shape}", map(byte_size, memory.values())))
    return rows


def _speedup(timing: Timing) -> str:
    """Return a speed-up with its quartiles, unless they lie on both sides of 1."""
    spread = timing.speedup
    quartiles = f"({spread.low:.2f}-{spread.high:.2f})"
    if spread.contains_one:
        return f"not shown {quartiles}"
    return f"{spread.median:.2f}× {quartiles}"


def speed_lines(speed: Speed) -> list[str]:
    """Return the printed form of a measurement of speed."""
    rows = [_row("", speed.models)]
    rows += speed_rows(speed)
    return [aligned(rows), speed_note(speed)]


def speed_note(speed: Speed) -> str:
    """Return a description of the measurement of speed."""
    return (
        f"Speed on {speed.device}: {speed.clock} time, {speed.threads} threads, {speed.repeats} repeats in turns, "
        f"{speed.new_tokens} new tokens. The speed-up is the median over the pairs of runs with the first model, with "
        f"its quartiles; it is not shown where they lie on both sides of 1. Memory: {speed.memory_is}."
    )


def _notes(measurement: Measurement) -> list[str]:
    """Return the meaning of the intervals, and the languages that got worse."""
    notes: list[str] = []

    for evaluation in measurement.evaluations.values():
        domains = evaluation.domains.values()
        has_loss = any(domain.perplexity is not None for domain in domains)
        has_vectors = any(domain.vectors is not None for domain in domains)

        if has_loss or has_vectors:
            notes.append(f"{INTERVAL}; {FEW_DOCUMENTS}")
        if has_loss and has_vectors:
            notes.append(MISSING_TEXT)
        elif has_loss and evaluation.seq_length:
            notes.append(_sample_note(evaluation))
        notes += language_lines(evaluation.languages)

    # Several models have the same notes.
    return list(dict.fromkeys(notes))


def _sample_note(evaluation: Evaluation) -> str:
    """Return the length of a sample and the token that it begins with."""
    note = f"Samples have {evaluation.seq_length} tokens"
    if evaluation.prefix is not None:
        note += f", each begins with {evaluation.prefix!r}"
    return f"{note}."
