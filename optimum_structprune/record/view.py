"""The lines and tables about a pruning and a training, which the console, the card and the page show."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from math import inf, isfinite
from shlex import join

from ..arch.spec import LAYER, MODEL, VOCAB
from ..config.domains import BUILT_IN, MODEL_WRITTEN
from ..config.pruning import LANGUAGES
from ..system.errors import capitalized
from ..system.margins import MANY_DOCUMENTS
from .answers import answers_lines, answers_warning
from .figures import (
    ORIGINAL,
    PRUNED,
    RECOVERED,
    AnswersResult,
    Figure,
    LanguageResult,
    TrimResult,
    UnseenResult,
    known_languages,
    mean_figure,
    mean_ratio,
    ratios_of,
    technical_ratio,
    worse_languages,
)
from .report import PRINTERS, RecoveryReport, Report
from .table import (
    UNKNOWN,
    aligned,
    byte_size,
    change_row,
    number,
    percent_change,
    ratio_text,
    times,
    value_text,
    vector_text,
)
from .verdict import LANGUAGE_LIMIT, Level, judge


# Warn if the removed share misses the requested share by more than a tenth of it.
MAX_TARGET_DEVIATION = 0.1
MAX_DOMAINS = 6
# The text of a suggested evaluation, until the user names other text.
SUGGESTED_TEXT = ("--domain", "general=builtin:general", "--num-samples", "64")
MAX_SCRIPTS = 6
# The units of each kind of space.
UNITS = {
    "mlp": "FFN channels",
    "attention": "KV groups",
    "expert": "experts",
    "hidden": "hidden channels",
    LAYER: "layers",
    VOCAB: "vocabulary entries",
}
REASONS = {
    "always": "special and byte tokens",
    "needed": "required by other tokens",
    "text": "seen in your text",
    "language": "frequent in the languages",
    "usual": "common in general text",
}
CHANGED = "the weights have changed since they were measured; these figures describe the weights before"
INTERVAL = "±: 90% confidence interval over documents"
FEW_DOCUMENTS = f"few documents: fewer than {MANY_DOCUMENTS}"
MISSING_TEXT = "Missing text: perplexity of masked words, or of the text that follows, relative to the original."
NOT_MEASURED = "The run measured no losses. `structprune evaluate` measures them."
SIMPLE_TEXT = "Built-in text is simpler than most text, so unseen text may lose more."


class View:
    """The content about a report. A table is a list of rows; the first row is the head.

    Args:
        report: The report of a pruning, with the training after it.
        answers: Answers that were collected later; by default those in the report.
    """

    def __init__(self, report: Report, answers: AnswersResult | None = None):
        self.report = report
        self.table = report.latest(answers)
        self.verdict = judge(report, answers)

    def lines(self) -> list[str]:
        """Return the lines of the console."""
        lines = self.warnings + self.sizes
        if self.losses:
            lines.append(aligned(self.losses))
        lines += self.notes + self.answers + self.training
        if not self.report.measured:
            lines.append(NOT_MEASURED)

        if self.report.is_quantized_only:
            lines.append(f"Verdict: {_quantized_line(self.report)}")
        elif self.verdict is not None:
            lines.append(f"Verdict: {self.verdict}.")
        return lines

    @property
    def warnings(self) -> list[str]:
        """Return a warning if the figures do not describe the saved weights."""
        return [f"warning: {CHANGED}"] if self.report.changed else []

    @property
    def sizes(self) -> list[str]:
        """Return the sizes of the original and the pruned model, the removed units, and the requested share."""
        report = self.report
        lines = []
        if report.original.parameters:
            change = percent_change(report.pruned.parameters / report.original.parameters)
            dtype = f" in {report.model.dtype}" if report.model.dtype else ""
            lines.append(
                f"Parameters: {report.original.parameters:,} → {report.pruned.parameters:,} ({change}); "
                f"weights {byte_size(report.original.bytes)} → {byte_size(report.pruned.bytes)}{dtype}"
            )

        lines += [phrase for kind, phrase in self.widths.items() if kind != VOCAB]
        if report.file is not None:
            lines.append(str(report.file))
        if report.speed is not None:
            lines.append(str(report.speed))
        return lines + request_lines(report)

    @property
    def size_table(self) -> list[list[str]]:
        """Return the table of the sizes of the original and the pruned model with their changes."""
        report = self.report
        rows = [["", ORIGINAL, PRUNED, "change"]]
        for kind, by_layer in sorted(report.widths.items()):
            label = UNITS.get(kind, kind)
            if MODEL not in by_layer:
                label += " per layer"
            rows.append(change_row(label, report.original_widths[kind], list(by_layer.values())))

        counts = {"parameters": "parameters", "layer_parameters": "parameters of the layers", "bytes": "weights"}
        for name, label in counts.items():
            original = getattr(report.original, name)
            show = byte_size if name == "bytes" else number
            if original:
                rows.append(change_row(label, original, getattr(report.pruned, name), show))
        return rows if len(rows) > 1 else []

    @property
    def widths(self) -> dict[str, str]:
        """Return the removed share of each kind of space: `FFN channels: 1,536 → 1,152 (-25.0%) in each of 30 layers`.

        Spaces that kept their full width are left out.
        """
        removed = self.report.removed_layers
        phrases = {}
        for kind, by_layer in sorted(self.report.widths.items()):
            full = self.report.original_widths[kind]
            widths = list(by_layer.values())
            if all(width == full for width in widths):
                continue

            _, before, after, change = change_row("", full, widths)
            phrase = capitalized(f"{UNITS.get(kind, kind)}: {before} → {after} ({change})")
            if kind == LAYER and removed:
                noun = "layer" if len(removed) == 1 else "layers"
                phrase += f": {noun} {', '.join(map(str, removed))} removed"
            elif MODEL not in by_layer and len(widths) == 1:
                phrase += " in one layer"
            elif MODEL not in by_layer:
                phrase += f" in each of {len(widths)} layers"
            phrases[kind] = phrase

        return phrases

    @cached_property
    def losses(self) -> list[list[str]]:
        """Return the table of losses by text relative to the original model.

        It has a column for the pruned model, and one for the recovered model if it was compared with the original one.
        """
        if self.table.has_vectors:
            return self._vector_table()

        figures = ratios_of(self.table.domains)
        unseen_perplexity = self.table.unseen_perplexity
        models = [PRUNED]
        measured = list(figures.values())
        if unseen_perplexity is not None:
            measured.append(unseen_perplexity)
        if any(figure.recovered is not None for figure in measured):
            models.append(RECOVERED)

        items = list(figures.items())
        if len(items) > MAX_DOMAINS:
            items.sort(key=lambda item: -(item[1].ratio or 0.0))
        rows = []
        for name, figure in items[:MAX_DOMAINS]:
            rows.append(_ratio_row(name, figure, models, self.table.domains[name].documents))
        if len(items) > MAX_DOMAINS:
            rows.append([f"({len(items) - MAX_DOMAINS} domains with lower losses)"] + [""] * len(models))

        if len(figures) > 1:
            rows.append(_ratio_row("mean over the calibration domains", _mean_of_ratios(figures), models))
        unseen = self.table.unseen
        if unseen is not None and unseen_perplexity is not None:
            rows.append(_ratio_row(unseen_label(unseen), unseen_perplexity, models, unseen.documents))
        if RECOVERED in models:
            rows += self._divergence_row()

        if rows:
            rows.insert(0, ["Perplexity relative to the original"] + models)
        return rows

    def _divergence_row(self) -> list[list[str]]:
        """Return the row of the mean KL divergence of the pruned and the recovered model."""
        domains = [domain for domain in self.table.domains.values() if domain.perplexity is not None]
        mean = mean_figure(domain.divergence for domain in domains if domain.divergence is not None)
        if mean.recovered is None:
            return []
        values = [f"{value:.3f}" for value in mean.values.values()]
        return [["KL to the original, mean (nats per token)"] + values]

    def _vector_table(self) -> list[list[str]]:
        """Return the similarity of an encoder's vectors to the original vectors, by domain."""
        head = ["Vectors compared with the original", "cosine", "neighbours kept", "retrieval"]
        if self.table.has_perplexity:
            head.append("missing text")

        rows = [head]
        for name, domain in self.table.domains.items():
            if domain.texts is None:
                continue
            row = [name, vector_text(domain.cosine), vector_text(domain.neighbours), vector_text(domain.retrieval)]
            if self.table.has_perplexity:
                row.append(ratio_text(domain.perplexity or Figure()))
            rows.append(row)
        return rows

    @property
    def notes(self) -> list[str]:
        """Return lines about the losses, the vocabulary and the languages."""
        notes = []
        figures = ratios_of(self.table.domains)
        if self.table.has_vectors:
            notes.append(f"Neighbours kept: of the 10 nearest texts. Retrieval: relative to the original. {INTERVAL}.")
            if self.table.has_perplexity:
                notes.append(MISSING_TEXT)
        elif figures:
            notes.append(self._interval_note())

        infinite = [name for name, figure in figures.items() if figure.ratio == inf]
        if infinite:
            notes.append(
                f"warning: the perplexity is infinite on {', '.join(infinite)}; the model cannot be used there"
            )
        recovery = self.report.recovery
        if recovery is not None and not recovery.has_original:
            ratios = [f"{name} {ratio_text(figure)}" for name, figure in ratios_of(recovery.domains).items()]
            if ratios:
                notes.append(f"Perplexity relative to the pruned model after training: {', '.join(ratios)}")
        return notes + self._vocabulary_notes() + language_lines(self.table.languages)

    def _interval_note(self) -> str:
        """Return the meaning of the intervals, and the lowest and the highest ratio of several domains."""
        note = INTERVAL
        documents = [domain.documents or 0 for domain in self.table.domains.values()]
        if self.table.unseen is not None:
            documents.append(self.table.unseen.documents or 0)
        if any(0 < count < MANY_DOCUMENTS for count in documents):
            note += f"; {FEW_DOCUMENTS}"
        note += "."

        ratios = [figure.ratio or 0.0 for figure in ratios_of(self.table.domains).values()]
        if len(ratios) > 1:
            note += f" Domains differ: {min(ratios):.2f}× to {max(ratios):.2f}×."
        return note

    def _vocabulary_notes(self) -> list[str]:
        """Return the number of removed tokens, and the share of words that are split into more tokens."""
        trimmed = self.report.trimmed
        if trimmed is None:
            return []

        size = self.report.original_widths[VOCAB]
        lines = [
            f"Vocabulary: {size:,} → {size - trimmed.tokens:,} entries; the removed ones are {trimmed.respelled:.2%} "
            "of the held-out tokens"
        ]
        unseen = self.table.unseen
        if unseen is not None and unseen.split_words is not None:
            lines.append(
                f"Words now split into more tokens: {unseen.split_words:.1%} of unseen text; technical text may reach "
                f"{technical_ratio(unseen.split_words):.2f}×"
            )
        if trimmed.unreadable:
            lines.append(f"Letters that can no longer be spelled, by script: {_by_count(trimmed.unreadable)}")
        if not self.report.domains and self.report.measured:
            lines.append("No loss was measured, because the model reads more than text.")
        return lines

    @property
    def details(self) -> Iterator[str]:
        """Yield the remarks that only the page and the card show."""
        for kind, by_layer in sorted(self.report.widths.items()):
            widths = list(by_layer.values())
            if len(set(widths)) > 1:
                yield f"{UNITS.get(kind, kind)} by layer: {' '.join(map(str, widths))}"

        unseen = self.table.unseen
        if not self.report.measured:
            yield NOT_MEASURED
        elif unseen is not None and unseen.source == BUILT_IN:
            yield SIMPLE_TEXT
        elif unseen is None and not self.table.has_vectors:  # vectors are not measured on unseen text
            yield "Unseen text was not measured, because none was available."

        if self.report.trimmed is not None:
            yield from _trim_details(self.report.trimmed)
        if len(self.report.shapes) > 1:
            for shape in self.report.shapes:
                yield _shape_line(shape)

    @property
    def answers(self) -> list[str]:
        """Return the answers to test questions, and a warning if many got worse."""
        if self.table.answers is None:
            return []
        return answers_lines(self.table.answers) + answers_warning(self.table.answers)

    @property
    def training(self) -> list[str]:
        """Return the cost of the training with the checkpoint that was kept, and the reason if it ended early."""
        recovery = self.report.recovery
        if recovery is None:
            return []
        cost = f"{recovery.tokens:,} tokens, {recovery.steps:,} steps, {recovery.seconds:,.0f} s"
        lines = [f"Recovery: {cost}; {recovery.checkpoint_phrase}"]
        if recovery.stopped:
            lines.append(recovery.stopped)
        return lines

    def next_command(self, model: str, output: str, can_recover: bool, flags: Sequence[str] = ()) -> str:
        """Return the command that a user should run next. It runs as it is.

        Args:
            model: The id or the folder of the original model; empty if it is unknown.
            output: The folder of the result.
            can_recover: Whether `recover` can train the result, and has not trained it.
            flags: Flags that loading the models takes.
        """
        needs_recovery = False
        if self.verdict is not None:
            needs_recovery = self.verdict.level in (Level.OWN_DOMAINS, Level.RECOVER)

        if can_recover and needs_recovery:
            words = ["structprune", "recover", output, f"{output.rstrip('/')}-recovered", "--teacher", model]
            return join(words + list(flags))

        words = ["structprune", "evaluate", output]
        if model:
            words += ["--against", model]
        words += SUGGESTED_TEXT
        return join(words + list(flags))


def report_lines(report: Report) -> list[str]:
    """Return the printed form of a report."""
    return View(report).lines()


def recovery_lines(recovery: RecoveryReport) -> list[str]:
    """Return the printed form of a training whose pruning has no report."""
    return report_lines(Report(model_type="", criterion="", recovery=recovery))


PRINTERS[Report] = report_lines
PRINTERS[RecoveryReport] = recovery_lines


def request_lines(report: Report) -> list[str]:
    """Return the requested and the removed share, as a warning if they differ much."""
    if report.target is None or not report.original.parameters:
        return []
    return [target_line(report.target, report.sparsity, report.removed)]


def target_line(target: float, sparsity: float, removed: float) -> str:
    """Return the requested and the removed share, as a warning if they differ by more than a tenth.

    Args:
        target: The requested share of the layer parameters.
        sparsity: The removed share of the layer parameters.
        removed: The removed share of all parameters.
    """
    text = f"requested {target:.1%} of the layer parameters, removed {sparsity:.1%} ({removed:.1%} of the whole model)"

    if abs(sparsity - target) <= MAX_TARGET_DEVIATION * target:
        return f"{capitalized(text)}."
    return f"warning: {text}; other targets, or a smaller round_to of channels, may come nearer"


def _ratio_row(label: str, figure: Figure, models: list[str], documents: int | None = None) -> list[str]:
    """Return the ratio of each model to the original one. Only the last one has an interval."""
    row = [label]
    for model in models:
        ratio = figure.ratio_of(model)
        if ratio is None:
            row.append(UNKNOWN)
        elif model == figure.model:
            row.append(times(ratio, figure.margin, documents))
        else:
            # The ratio has as many decimal places as the last one.
            row.append(times(ratio, figure.margin).partition(" ")[0])
    return row


def _mean_of_ratios(figures: Mapping[str, Figure]) -> Figure:
    """Return the geometric means of the ratios of each model over domains, with the margin of the last one."""
    first = next(iter(figures.values()))
    means = {ORIGINAL: 1.0}
    margin = None
    for model in list(first.values)[1:]:
        means[model], margin = mean_ratio(figure.of_model(model) for figure in figures.values())
    return Figure.of(means, margin)


def unseen_label(unseen: UnseenResult) -> str:
    """Return the name of unseen text with its origin."""
    if unseen.source == MODEL_WRITTEN:
        return "unseen text (sampled from the original model)"
    if unseen.source:
        return f"unseen text ({unseen.source})"
    return "unseen text"


def language_lines(languages: Mapping[str, LanguageResult]) -> list[str]:
    """Return the cost of the requested languages, and the languages that got worse."""
    measured = {code: result for code, result in languages.items() if result.cost.ratio is not None}
    if not measured:
        return []

    # The result says whether the original model knows a language only where bits were measured.
    unit = "tokens"
    if any(result.known is not None for result in measured.values()):
        unit = "bits per byte"

    lines = []
    requested = [_language(code, result) for code, result in measured.items() if result.wanted]
    if requested:
        lines.append(f"Wanted languages ({unit}): {', '.join(requested)}")

    known = known_languages(measured)
    worse = [_worse_language(code, result) for code, result in worse_languages(measured, LANGUAGE_LIMIT).items()]
    line = f"Languages checked: {len(known)}; {len(worse) or 'none'} got worse by more than {LANGUAGE_LIMIT - 1:.0%}"
    if any(result.cosine is not None for result in known.values()):
        line += " (cosine or tokens)"
    else:
        line += f" ({unit})"
    if worse:
        line += f": {', '.join(worse[:MAX_SCRIPTS])}"
    lines.append(line)
    return lines


def _worse_language(code: str, result: LanguageResult) -> str:
    """Return the name of a language with its cosine or its relative cost."""
    if result.cosine is not None:
        return f"{LANGUAGES[code]} {result.cosine.last:.2f}"
    return f"{LANGUAGES[code]} {result.cost.ratio or 0.0:.2f}×"


def _language(code: str, result: LanguageResult) -> str:
    """Return the name of a language with its relative cost."""
    text = f"{LANGUAGES[code]} {times(result.cost.ratio or 0.0)}"
    if result.known is False:
        text += " (not supported by the original model)"
    if result.cosine is not None:
        text += f" (cosine {value_text(result.cosine)})"
    return text


def _trim_details(trimmed: TrimResult) -> Iterator[str]:
    """Yield the number of kept tokens by reason, and the number of removed tokens by script."""
    reasons = [f"{REASONS.get(reason, reason)} {count:,}" for reason, count in sorted(trimmed.reasons.items())]
    yield f"Tokens were kept because they are: {', '.join(reasons)}."

    if trimmed.scripts:
        yield f"Removed tokens by script: {_by_count(trimmed.scripts)}."


def _by_count(scripts: Mapping[str, int]) -> str:
    """Return the scripts with the largest counts."""
    largest = sorted(scripts.items(), key=lambda item: -item[1])
    parts = []
    for name, count in largest[:MAX_SCRIPTS]:
        if name != "CJK":
            name = name.title()
        parts.append(f"{name} {count:,}")

    text = ", ".join(parts)

    num_others = len(largest) - MAX_SCRIPTS
    if num_others > 0:
        text += f" and {num_others} others"
    return text


def _quantized_line(report: Report) -> str:
    """Return the verdict that fewer bits are better than pruning, with the best pruned shape."""
    pruned = [shape for shape in report.shapes if shape["widths"]]
    chosen = next(shape for shape in report.shapes if shape["chosen"])
    text = f"Quantized, not pruned: {chosen['proposed_by']}, loss {chosen['loss']:.4f}."
    if pruned:
        best = min(pruned, key=lambda shape: shape["loss"])
        text += f" The best pruned shape is not better. {_shape_line(best)}."
    return text


def _shape_line(shape: Mapping[str, object]) -> str:
    """Return one of the shapes that an allocation tried."""
    widths = shape["widths"]
    assert isinstance(widths, Mapping)

    parts = []
    for kind, width in widths.items():
        values = [width]
        if isinstance(width, Mapping):
            values = list(width.values())
        parts.append(f"{UNITS.get(kind, kind)} {number(values)}")

    verb = "Chosen" if shape["chosen"] else "Tried"
    loss = shape["loss"]
    measured = "not finite"
    if isinstance(loss, (int, float)) and isfinite(loss):
        measured = f"{loss:.4f}"
    widths_text = f" ({', '.join(parts)})" if parts else ""
    return f"{verb}: {shape['proposed_by']}{widths_text}, loss {measured}"
