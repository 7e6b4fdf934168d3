"""The printed form of an evaluation: sizes, quality and speed of several models side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from statistics import median
from typing import NamedTuple

from .answers import (
    PROPERTIES,
    followed,
    is_compared,
    paired,
    points,
    question_lines,
    right_by_kind,
    right_difference,
    sample_questions,
    with_ends,
)
from .figures import ORIGINAL, PRUNED, AnswersResult, TextResult, mean_figure, mean_ratio, ratios_of
from .report import PRINTERS, Evaluation, MeasuredModel, Measurement, Speed, Timing
from .table import MAX_DIGITS, UNKNOWN, aligned, byte_size, number, ratio_text, times, value_text, with_margin
from .view import FEW_DOCUMENTS, INTERVAL, MISSING_TEXT, UNITS, language_lines


# The figures that have one row for each text, by their attribute.
ROWS_OF_TEXTS = {
    "divergence": "KL to the original",
    "agreement": "same most likely token",
    "cosine": "cosine",
    "cosine_p5": "cosine, 5th percentile",
    "cosine_worst": "cosine, lowest",
    "neighbours": "neighbours kept",
    "retrieval": "retrieval (mean reciprocal rank)",
}


# The rows of sizes and their formats, by their attribute.
ROWS_OF_SIZES: dict[str, tuple[str, Callable[[int], str]]] = {
    "layers": ("layers", number),
    "parameters": ("parameters", number),
    "bytes": ("weights", byte_size),
    "cache_per_token": ("cache bytes per token", number),
}


class Column(NamedTuple):
    """One model of the table.

    Attributes:
        name: Its name.
        measured: Its sizes.
        evaluation: The evaluation with its figures. Models that are compared with the original model have the figures
            of the original model.
        key: The name of its figures in the evaluation.
    """

    name: str
    measured: MeasuredModel
    evaluation: Evaluation
    key: str

    def result(self, name: str) -> TextResult:
        """Return the result on a domain, which is empty if the model was not measured there."""
        return self.evaluation.domains.get(name, TextResult()).of_model(self.key)


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
        lines += [question_lines(question) for question in sample_questions(evaluations[0].answers)]

    for evaluation in evaluations:
        lines += [f"warning: {warning}" for warning in evaluation.warnings]
    return lines


def evaluation_lines(evaluation: Evaluation) -> list[str]:
    """Return the printed form of an evaluation."""
    name = "model" if evaluation.original is None else PRUNED
    return measurement_lines(Measurement({name: MeasuredModel(evaluation.model, evaluation=evaluation)}))


def speed_lines(speed: Speed) -> list[str]:
    """Return the printed form of a measurement of speed."""
    rows = [_row("", speed.models)]
    rows += speed_rows(speed)
    return [aligned(rows), speed_note(speed)]


PRINTERS[Measurement] = measurement_lines
PRINTERS[Evaluation] = evaluation_lines
PRINTERS[Speed] = speed_lines


def measurement_table(measurement: Measurement) -> list[list[str]]:
    """Return the table of all figures, with one column for each model."""
    columns = _columns(measurement)
    rows = [_row("", (column.name for column in columns))]
    rows += _size_rows(columns)
    rows += _quality_rows(columns, measurement.evaluations)
    rows += _answer_rows(columns)
    if measurement.speed is not None:
        rows += speed_rows(measurement.speed)
    return rows


def _columns(measurement: Measurement) -> list[Column]:
    """Return the models of the table, with the original model if any figure belongs to it."""
    first = next(iter(measurement.evaluations), Evaluation(model=""))
    columns = []
    for name, model in measurement.models.items():
        key = ORIGINAL if model.evaluation is None else PRUNED
        columns.append(Column(name, model, model.evaluation or first, key))

    if first.original is not None and all(column.key == PRUNED for column in columns):
        columns.insert(0, Column(ORIGINAL, MeasuredModel(ORIGINAL), first, ORIGINAL))
    return columns


def _row(label: str, cells: Iterable[str]) -> list[str]:
    """Return a row of the table."""
    row = [label]
    row += cells
    return row


def _size_rows(columns: Sequence[Column]) -> list[list[str]]:
    """Return the rows of widths, parameters and bytes."""
    kinds: dict[str, None] = {}
    for column in columns:
        kinds.update(dict.fromkeys(column.measured.widths))
    rows = []
    for kind in kinds:
        widths = [column.measured.widths.get(kind) for column in columns]
        rows.append(_row(UNITS.get(kind, kind), map(number, widths)))

    for attribute, (label, show) in ROWS_OF_SIZES.items():
        values = [getattr(column.measured.size, attribute, None) or None for column in columns]
        if any(values):
            rows.append(_row(label, (show(value) if value else UNKNOWN for value in values)))
    return rows


def _quality_rows(columns: Sequence[Column], evaluations: Sequence[Evaluation]) -> list[list[str]]:
    """Return the rows of perplexity, similarity to the original model, and vectors."""
    domains: dict[str, None] = {}
    for evaluation in evaluations:
        domains.update(dict.fromkeys(evaluation.domains))
    with_record = [evaluation for evaluation in evaluations if evaluation.calibrated is not None]

    rows = []
    for name in domains:
        label = f"perplexity, {name}"
        if with_record:
            if with_record[0].is_calibration_domain(name):
                label += " (calibration domain)"
            else:
                label += " (unseen)"
        rows.append(_row(label, (perplexity_cell(column.result(name)) for column in columns)))

    if with_record:
        rows += _mean_row("calibration domains", columns, True)
        rows += _mean_row("unseen domains", columns, False)
    else:
        rows += _mean_row("domains", columns, None)
    rows.append(_row("bits per byte, mean", map(_mean_bits, columns)))

    for attribute, label in ROWS_OF_TEXTS.items():
        for name in domains:
            figures = [getattr(column.result(name), attribute) for column in columns]
            rows.append(_row(f"{label}, {name}", map(value_text, figures)))

    return [row for row in rows if any(cell not in ("", UNKNOWN) for cell in row[1:])]


def perplexity_cell(result: TextResult) -> str:
    """Return a perplexity, as a ratio to the original model if there is one."""
    figure = result.perplexity
    if figure is None or figure.last is None:
        return UNKNOWN
    if figure.ratio is None:
        return with_margin(figure.last, figure.margin, 2)
    return ratio_text(figure, result.documents)


def _mean_row(label: str, columns: Sequence[Column], is_calibration: bool | None) -> list[list[str]]:
    """Return the mean ratio over the domains of one kind, or nothing if no model has two of them.

    Args:
        label: The name of the kind.
        columns: The models.
        is_calibration: Whether the domains are calibration domains; None selects all.
    """
    row = [f"perplexity, mean over the {label}"]
    counts = []
    for column in columns:
        evaluation = column.evaluation
        results = {}
        for name in evaluation.domains:
            if is_calibration in (None, evaluation.is_calibration_domain(name)):
                results[name] = column.result(name)

        figures = ratios_of(results).values()
        counts.append(len(figures))
        if figures:
            mean, margin = mean_ratio(figures)
            row.append(times(mean, margin))
        else:
            row.append("")

    if max(counts) < 2:
        return []
    return [row]


def _mean_bits(column: Column) -> str:
    """Return the mean bits per byte over the domains."""
    figures = [column.result(name).bits_per_byte for name in column.evaluation.domains]
    mean = mean_figure(figure for figure in figures if figure is not None)
    return number(mean.last, MAX_DIGITS)


def _answer_rows(columns: Sequence[Column]) -> list[list[str]]:
    """Return the counts of correct, repetitive and finished answers, and how models follow the original's answers."""
    if all(column.evaluation.answers is None for column in columns):
        return []

    rows = []
    for name, word in PROPERTIES.items():
        rows.append(_row(f"answers {word}", (_count(column, name) for column in columns)))
    rows += _difference_rows(columns)
    rows.append(_row("median length of an answer (tokens)", map(_median_length, columns)))

    by_kind: dict[str, dict[str, str]] = {}
    for column in columns:
        answers = column.evaluation.answers or AnswersResult()
        for kind, (right, total) in right_by_kind(answers, column.key).items():
            by_kind.setdefault(kind, {})[column.name] = f"{right} of {total}"
    for kind, cells in by_kind.items():
        rows.append(_row(f"answers correct, {kind}", (cells.get(column.name, UNKNOWN) for column in columns)))
    return rows


def _difference_rows(columns: Sequence[Column]) -> list[list[str]]:
    """Return the differences of the models to the original model on the questions, with their intervals."""
    labels = ("agreement with the original's answers", "tokens to the first disagreement", "log-probability per byte")
    cells: dict[str, dict[str, str]] = {}
    for column in columns:
        answers = column.evaluation.answers
        if column.key == ORIGINAL or answers is None or not is_compared(answers):
            continue
        cells.setdefault("answers correct, difference", {})[column.name] = points(right_difference(answers))
        result = followed(answers, column.key)
        if result is not None:
            for label, interval, digits in zip(labels, result, (3, 1, 3), strict=True):
                cells.setdefault(label, {})[column.name] = with_ends(interval, digits)

    rows = []
    for label, by_name in cells.items():
        rows.append(_row(label, [by_name.get(column.name, UNKNOWN) for column in columns]))
    return rows


def _count(column: Column, name: str) -> str:
    """Return a count of answers of one model: `10 of 16 (worse, p = 0.030)`."""
    answers = column.evaluation.answers
    if answers is None:
        return UNKNOWN

    count = sum(getattr(question.answers[column.key], name) for question in answers.questions)
    text = f"{count} of {len(answers.questions)}"
    if column.key == PRUNED and len(answers.models) > 1:
        text += " ({}, p = {:.3f})".format(*paired(answers, name))
    return text


def _median_length(column: Column) -> str:
    """Return the median number of tokens of the answers of one model."""
    answers = column.evaluation.answers
    if answers is None:
        return UNKNOWN
    return number(median(question.answers[column.key].tokens for question in answers.questions))


def speed_rows(speed: Speed) -> list[list[str]]:
    """Return tokens or texts per second, the speed-up where its quartiles show one, and memory."""
    rows = []
    stages = (
        ("reading", "tokens/s", speed.prefill),
        ("writing", "tokens/s", speed.decode),
        ("encoding", "texts/s", speed.encode),
    )
    for word, unit, stage in stages:
        for shape, timings in stage.items():
            rates = [number(timing.tokens_per_second, 1) for timing in timings.values()]
            rows.append(_row(f"{word}, {unit}, {shape}", rates))

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


def speed_note(speed: Speed) -> str:
    """Return a description of the measurement of speed."""
    new_tokens = "" if speed.encode else f", {speed.new_tokens} new tokens"
    return (
        f"Speed on {speed.device}: {speed.clock} time, {speed.threads} threads, {speed.repeats} repeats in turns"
        f"{new_tokens}. The speed-up is the median over the pairs of runs with the first model, with "
        f"its quartiles; it is not shown where they lie on both sides of 1. Memory: {speed.memory_is}."
    )


def _notes(measurement: Measurement) -> Iterable[str]:
    """Return the meaning of the intervals, and the languages that got worse."""
    notes: list[str] = []
    for evaluation in measurement.evaluations:
        if evaluation.has_perplexity or evaluation.has_vectors:
            notes.append(f"{INTERVAL}; {FEW_DOCUMENTS}")
        if evaluation.has_perplexity and evaluation.has_vectors:
            notes.append(MISSING_TEXT)
        elif evaluation.has_perplexity and evaluation.seq_length:
            prefix = "" if evaluation.prefix is None else f", each begins with {evaluation.prefix!r}"
            notes.append(f"Samples have {evaluation.seq_length} tokens{prefix}.")
        notes += language_lines(evaluation.languages)

    # Several models have the same notes.
    return dict.fromkeys(notes)
