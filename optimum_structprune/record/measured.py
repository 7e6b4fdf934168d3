"""The printed result of `structprune evaluate`: sizes, quality and speed of several models side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from statistics import median
from typing import TYPE_CHECKING

from .answers import FIGURES, paired, question_lines, sample_questions
from .figures import AnswersResult, DomainResult, Figure, VectorResult, mean_figure, mean_ratio, ratios_of
from .summary import FEW_DOCUMENTS, INTERVAL, MISSING_TEXT, UNITS, language_lines
from .table import UNKNOWN, aligned, byte_size, number, times, with_margin


if TYPE_CHECKING:
    from .evaluation import Evaluation, MeasuredModel, Measurement
    from .speed import Speed, Timing

Rows = list[list[str]]


def measurement_lines(measurement: Measurement) -> list[str]:
    """Return the printed form of the measurements of several models."""
    table = measurement_table(measurement)
    lines = [aligned(table)] if len(table) > 1 else []
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
    columns = measurement.columns()
    rows = [["", *columns]]
    rows += _size_rows(columns)
    rows += quality_rows(measurement)
    if measurement.speed is not None:
        rows += speed_rows(measurement.speed)
    return rows


def _size_rows(columns: Mapping[str, MeasuredModel]) -> Rows:
    """Return the rows of widths, parameters and bytes."""
    rows: Rows = []
    kinds = dict.fromkeys(kind for model in columns.values() for kind in model.widths)
    for kind in kinds:
        rows.append([UNITS.get(kind, kind), *(number(model.widths.get(kind)) for model in columns.values())])

    sizes = [model.size for model in columns.values()]
    if not any(sizes):
        return rows
    rows.append(["layers", *(number(None if size is None else size.layers) for size in sizes)])
    rows.append(["parameters", *(UNKNOWN if size is None else f"{size.parameters:,}" for size in sizes)])
    rows.append(["weights", *(UNKNOWN if size is None else byte_size(size.bytes) for size in sizes)])
    if any(size is not None and size.cache_per_token is not None for size in sizes):
        caches = [None if size is None else size.cache_per_token for size in sizes]
        rows.append(["cache bytes per token", *map(number, caches)])
    return rows


def quality_rows(measurement: Measurement) -> Rows:
    """Return the rows of perplexity, closeness to the original model, vectors and answers."""
    columns = measurement.columns()
    evaluations = [columns[name].evaluation for name in columns]
    measured = [evaluation for evaluation in evaluations if evaluation is not None]
    domains = list(dict.fromkeys(name for evaluation in measured for name in evaluation.domains))

    rows: Rows = []
    for name in domains:
        rows.append(_perplexity_row(name, measured, evaluations))
    rows += _mean_rows(measured, evaluations)
    rows += _domain_rows(domains, evaluations, "bits per byte", lambda domain: domain.bits_per_byte, mean_alone=True)
    rows += _domain_rows(domains, evaluations, "KL to the original", lambda domain: domain.divergence)
    rows += _domain_rows(domains, evaluations, "same most likely token", lambda domain: domain.agreement)
    vectors: dict[str, Callable[[VectorResult], Figure | None]] = {
        "cosine": lambda vector: vector.cosine,
        "cosine, 5th percentile": lambda vector: Figure(pruned=vector.cosine_p5),
        "cosine, lowest": lambda vector: Figure(pruned=vector.cosine_worst),
        "neighbours kept": lambda vector: vector.neighbours,
        "translations found": lambda vector: vector.retrieval,
    }
    for label, select in vectors.items():
        rows += _domain_rows(domains, evaluations, label, _of_vectors(select))
    rows += _answer_rows(evaluations)
    return [row for row in rows if any(cell not in ("", UNKNOWN) for cell in row[1:])]


def _of_vectors(select: Callable[[VectorResult], Figure | None]) -> Callable[[DomainResult], Figure | None]:
    """Return a function that selects a figure of the vectors of a domain."""
    return lambda domain: None if domain.vectors is None else select(domain.vectors)


def _domain_label(name: str, evaluations: Iterable[Evaluation]) -> str:
    """Return the name of a domain, and whether the model was calibrated on this kind of text."""
    for evaluation in evaluations:
        if evaluation.calibrated is not None:
            is_own = evaluation.is_calibration_domain(name)
            return f"{name} ({'calibration domain' if is_own else 'unseen'})"
    return name


def _perplexity_row(name: str, measured: list[Evaluation], evaluations: list[Evaluation | None]) -> list[str]:
    """Return the perplexity of the original model, and the ratios of the others to it."""
    dense = [evaluation.domains[name].perplexity for evaluation in measured if name in evaluation.domains]
    original = next((figure.dense for figure in dense if figure is not None), None)
    cells = []
    for evaluation in evaluations:
        if evaluation is None:
            cells.append(number(original, 2))
            continue
        domain = evaluation.domains.get(name, DomainResult())
        figure = domain.perplexity
        if figure is None:
            cells.append(UNKNOWN)
        elif figure.ratio is None:
            cells.append(with_margin(figure.last or 0.0, figure.margin, 2))
        else:
            cells.append(times(figure.ratio, figure.margin, domain.documents))
    return [f"perplexity, {_domain_label(name, measured)}", *cells]


def _mean_rows(measured: list[Evaluation], evaluations: list[Evaluation | None]) -> Rows:
    """Return the mean ratios over the domains, apart for calibration domains and unseen ones."""
    rows = []
    for label, is_own in (("calibration domains", True), ("unseen domains", False)):
        cells = []
        count = 0
        for evaluation in evaluations:
            ratios = {} if evaluation is None else ratios_of(evaluation.domains)
            if evaluation is not None and evaluation.calibrated is not None:
                ratios = {
                    name: figure for name, figure in ratios.items() if evaluation.is_calibration_domain(name) == is_own
                }
            elif not is_own:
                ratios = {}
            count = max(count, len(ratios))
            cells.append(times(*mean_ratio(ratios.values())) if ratios else "")
        if count > 1:
            known = any(evaluation.calibrated is not None for evaluation in measured)
            rows.append([f"perplexity, mean over the {label if known else 'domains'}", *cells])
    return rows


def _domain_rows(
    domains: Iterable[str],
    evaluations: list[Evaluation | None],
    label: str,
    select: Callable[[DomainResult], Figure | None],
    mean_alone: bool = False,
) -> Rows:
    """Return one row for each domain of a figure, or the row of its mean alone."""
    by_domain: Rows = []
    for name in domains:
        figures = [None if item is None else select(item.domains.get(name, DomainResult())) for item in evaluations]
        original = next((figure.dense for figure in figures if figure is not None), None)
        cells = []
        for evaluation, figure in zip(evaluations, figures, strict=True):
            cells.append(number(original, 3) if evaluation is None else _last(figure))
        by_domain.append([f"{label}, {name}", *cells])
    if not mean_alone or len(by_domain) < 2:
        return by_domain

    cells = []
    measured = [evaluation for evaluation in evaluations if evaluation is not None]
    for evaluation in evaluations:
        source = evaluation or measured[0]
        selected = [select(domain) for domain in source.domains.values()]
        mean = mean_figure(figure for figure in selected if figure is not None)
        cells.append(number(mean.dense if evaluation is None else mean.last, 3))
    return [[f"{label}, mean", *cells]]


def _last(figure: Figure | None) -> str:
    """Return the last value of a figure, with its margin where that belongs to the value."""
    if figure is None or figure.last is None:
        return UNKNOWN
    has_own_margin = figure.dense is None
    return with_margin(figure.last, figure.margin if has_own_margin else None)


def _answer_rows(evaluations: list[Evaluation | None]) -> Rows:
    """Return the counts of correct, repetitive and finished answers, and the median length."""
    measured = [evaluation for evaluation in evaluations if evaluation is not None]
    answers = [evaluation.answers for evaluation in measured]
    found = [answer for answer in answers if answer is not None]
    if not found:
        return []

    rows: Rows = []
    for name, word in FIGURES.items():
        cells = []
        for evaluation in evaluations:
            result = found[0] if evaluation is None else evaluation.answers
            cells.append(UNKNOWN if result is None else _count(result, name, is_original=evaluation is None))
        rows.append([f"answers {word}", *cells])

    lengths = []
    for evaluation in evaluations:
        result = found[0] if evaluation is None else evaluation.answers
        model = None if result is None else result.models[0 if evaluation is None else -1]
        lengths.append(UNKNOWN if result is None or model is None else f"{median(result.tokens(model)):,.0f}")
    rows.append(["median length of an answer (tokens)", *lengths])

    divergences = [
        None if evaluation is None or evaluation.answers is None else evaluation.answers.divergence
        for evaluation in evaluations
    ]
    rows.append(["KL to the original along its answers", *(number(value, 3) for value in divergences)])
    return rows


def _count(answers: AnswersResult, name: str, is_original: bool) -> str:
    """Return a count of answers of the original or the last model: `10 of 16 (worse, p = 0.030)`."""
    counts = answers.counts(name)
    total = len(answers.questions)
    if is_original:
        return f"{counts[0]} of {total}"
    text = f"{counts[-1]} of {total}"
    if len(counts) < 2:
        return text
    comparison = paired(answers, name)
    return f"{text} ({comparison.verdict}, p = {comparison.p_value:.3f})"


def speed_rows(speed: Speed) -> Rows:
    """Return tokens per second, the speed-up where its quartiles show one, and memory."""
    rows: Rows = []
    for word, stage in (("reading", speed.prefill), ("writing", speed.decode)):
        for shape, timings in stage.items():
            rows.append(
                [f"{word}, tokens/s, {shape}", *(f"{item.tokens_per_second:,.1f}" for item in timings.values())]
            )
            if len(timings) > 1:
                first, *others = timings.values()
                rows.append([f"{word}, speed-up, {shape}", UNKNOWN, *map(_speedup, others)])
    for shape, memory in speed.run_memory.items():
        rows.append([f"memory, {shape}", *map(byte_size, memory.values())])
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
    return [aligned([["", *speed.models], *speed_rows(speed)]), speed_note(speed)]


def speed_note(speed: Speed) -> str:
    """Return how speed was measured."""
    return (
        f"Speed on {speed.device}: {speed.clock} time, {speed.threads} threads, {speed.repeats} repeats in turns, "
        f"{speed.new_tokens} new tokens. The speed-up is the median over the pairs of runs with the first model, with "
        f"its quartiles; it is not shown where they lie on both sides of 1. Memory: {speed.memory_is}."
    )


def _notes(measurement: Measurement) -> list[str]:
    """Return the meaning of the intervals, and the languages that got worse."""
    evaluations = measurement.evaluations
    lines: list[str] = []
    for evaluation in evaluations.values():
        domains = evaluation.domains.values()
        has_loss = any(domain.perplexity is not None for domain in domains)
        has_vectors = any(domain.vectors is not None for domain in domains)
        if has_loss or has_vectors:
            lines.append(f"{INTERVAL}; {FEW_DOCUMENTS}")
        if has_loss and has_vectors:
            lines.append(MISSING_TEXT)
        elif has_loss and evaluation.seq_length:
            prefix = "" if evaluation.prefix is None else f", each begins with {evaluation.prefix!r}"
            lines.append(f"Samples have {evaluation.seq_length} tokens{prefix}.")
        lines += language_lines(evaluation.languages)
    return list(dict.fromkeys(lines))
