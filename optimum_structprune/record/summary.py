"""The printed result of a pruning and of a training: sizes, losses by domain, answers, and a verdict."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import inf, isfinite
from shlex import join
from typing import TYPE_CHECKING

from ..arch.spec import LAYER, MODEL, VOCAB
from ..config.pruning import LANGUAGES
from ..errors import capitalized
from ..forward.metrics import MANY_DOCUMENTS
from .answers import answers_line, answers_warning
from .figures import (
    AnswersResult,
    DomainResult,
    Figure,
    LanguageResult,
    TrimResult,
    UnseenResult,
    known_languages,
    mean_figure,
    mean_ratio,
    ratios_of,
    technical_ratio,
)
from .table import UNKNOWN, aligned, byte_size, number, percent_change, ratio_text, times, with_margin
from .verdict import LANGUAGE_LIMIT, Level, Verdict, judge, judged_domains, judged_unseen


if TYPE_CHECKING:
    from .report import RecoveryReport, Report

# A removed share that differs from the requested one by more than this part of it is a warning.
MAX_DEVIATION = 0.1
MAX_DOMAINS = 6
# The text of a suggested evaluation, until the user names other text.
UNSEEN_TEXT = ("--domain", "general=builtin:general", "--num-samples", "64")
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
SIMPLE_TEXT = "Built-in text is simpler than most text, so unseen text may lose more."


def report_lines(report: Report, answers: AnswersResult | None = None) -> list[str]:
    """Return the printed form of a report.

    Args:
        report: The report of a pruning, with the training after it.
        answers: Answers that were collected later; by default those in the report.
    """
    lines = []
    if report.changed:
        lines.append(f"warning: {CHANGED}")

    lines += size_lines(report)
    lines += loss_lines(report)
    lines += vocabulary_lines(report)
    lines += language_lines(report.languages)

    latest_answers = answers or report.latest_answers
    if latest_answers is not None:
        lines.append(answers_line(latest_answers))
        lines += answers_warning(latest_answers)

    if report.recovery is not None:
        lines += training_lines(report.recovery)

    verdict = judge(report, answers)
    if verdict is not None:
        lines.append(f"Verdict: {verdict}.")
    return lines


def size_lines(report: Report) -> list[str]:
    """Return the sizes of the original and the pruned model, and the requested share."""
    lines = []
    dense = report.dense
    pruned = report.pruned

    if dense.parameters:
        change = percent_change(pruned.parameters / dense.parameters)
        dtype = f" in {report.model.dtype}" if report.model.dtype else ""
        lines.append(
            f"Parameters: {dense.parameters:,} → {pruned.parameters:,} ({change}); "
            f"weights {byte_size(dense.bytes)} → {byte_size(pruned.bytes)}{dtype}"
        )

    for kind, phrase in width_phrases(report).items():
        if kind != VOCAB:
            lines.append(phrase)

    request = request_line(report)
    if request:
        lines.append(request)
    return lines


def width_phrases(report: Report) -> dict[str, str]:
    """Return the removed share of each kind of space: `FFN channels: 1,536 → 1,152 (-25.0%) in each of 30 layers`."""
    phrases = {}

    for kind, by_layer in sorted(report.widths.items()):
        full = report.dense_widths[kind]
        widths = list(by_layer.values())
        if all(width == full for width in widths):
            continue

        change = percent_change(sum(widths) / (full * len(widths)))
        phrase = f"{UNITS.get(kind, kind)}: {full:,} → {number(widths)} ({change})"
        phrase = capitalized(phrase)

        if kind == LAYER and report.removed_layers:
            noun = "layer" if len(report.removed_layers) == 1 else "layers"
            phrase += f": {noun} {', '.join(map(str, report.removed_layers))} removed"
        elif MODEL not in by_layer and len(widths) == 1:
            phrase += " in one layer"
        elif MODEL not in by_layer:
            phrase += f" in each of {len(widths)} layers"
        phrases[kind] = phrase

    return phrases


def request_line(report: Report) -> str:
    """Return the requested and the removed share, as a warning if they differ much; empty without a request."""
    if report.wish:
        return _loss_request(report)
    if report.target is None or not report.dense.parameters:
        return ""
    return target_line(report.target, report.sparsity, report.removed)


def target_line(target: float, sparsity: float, removed: float) -> str:
    """Return the requested and the removed share, as a warning if they differ by more than a tenth.

    Args:
        target: The requested share of the layer parameters.
        sparsity: The removed share of the layer parameters.
        removed: The removed share of all parameters.
    """
    text = f"requested {target:.1%} of the layer parameters, removed {sparsity:.1%} ({removed:.1%} of the whole model)"

    if abs(sparsity - target) <= MAX_DEVIATION * target:
        return f"{capitalized(text)}."
    return f"warning: {text}; other targets, or a smaller round_to of channels, may come nearer"


def _loss_request(report: Report) -> str:
    """Return the requested loss and the result of the trial prunings."""
    wish = report.wish
    limit = wish["loss"]
    losses = []
    is_exceeded = False

    for text, (loss, margin) in wish["measured"].items():
        if margin is None:
            losses.append(f"{loss:.1%} on {text}")
            lower_end = loss
        else:
            losses.append(f"{loss:.1%} ± {margin:.1%} on {text}")
            lower_end = loss - margin
        is_exceeded = is_exceeded or lower_end > limit

    start = "warning: target" if is_exceeded else "Target"
    next_loss = f"about {wish['next']:.1%}"
    if wish["next"] > 1:
        next_loss = "more than 100%"

    return (
        f"{start} loss {limit:.1%}: {report.removed:.1%} smaller costs {' and '.join(losses)} "
        f"({len(wish['trials'])} trials); removing another 5% would cost {next_loss}"
    )


def loss_lines(report: Report) -> list[str]:
    """Return the table of losses by domain, and the meaning of its intervals."""
    lines = []
    table = loss_table(report)

    if table:
        lines.append(aligned(table))
    lines += loss_notes(report)
    return lines


def size_table(report: Report) -> list[list[str]]:
    """Return the sizes of the original and the pruned model with their changes."""
    dense = report.dense
    pruned = report.pruned
    rows = []

    for kind, by_layer in sorted(report.widths.items()):
        full = report.dense_widths[kind]
        widths = list(by_layer.values())
        label = UNITS.get(kind, kind)
        if MODEL not in by_layer:
            label += " per layer"
        rows.append([label, number(full), number(widths), percent_change(sum(widths) / (full * len(widths)))])

    if dense.parameters:
        rows.append(_count_row("parameters", dense.parameters, pruned.parameters))
    if dense.layer_parameters:
        rows.append(_count_row("parameters of the layers", dense.layer_parameters, pruned.layer_parameters))
    if dense.bytes:
        change = percent_change(pruned.bytes / dense.bytes)
        rows.append(["weights", byte_size(dense.bytes), byte_size(pruned.bytes), change])

    if not rows:
        return []
    rows.insert(0, ["", "original", "pruned", "change"])
    return rows


def _count_row(label: str, dense: int, pruned: int) -> list[str]:
    """Return a row with the counts of the original and the pruned model, and the change."""
    return [label, f"{dense:,}", f"{pruned:,}", percent_change(pruned / dense)]


def loss_table(report: Report) -> list[list[str]]:
    """Return the losses by domain relative to the original model.

    The table has a column for the pruned model. If the model was trained after pruning and compared with the original
    one, a second column shows the recovered model.
    """
    if _has_vectors(report.domains):
        return _vector_table(report.domains)

    recovery = report.recovery
    has_recovered = recovery is not None and recovery.has_dense
    return _ratio_table(judged_domains(report), judged_unseen(report), has_recovered)


def loss_notes(report: Report) -> list[str]:
    """Return the meaning of the intervals in the table of losses, and warnings of infinite losses."""
    recovery = report.recovery
    domains = report.domains
    unseen = report.unseen
    if recovery is not None and recovery.has_dense:
        domains = recovery.domains
        unseen = recovery.unseen or unseen

    notes = []
    if _has_vectors(domains):
        notes.append(f"Neighbours kept: share of the 10 nearest texts. {INTERVAL}.")
        if _has_perplexity(domains):
            notes.append(MISSING_TEXT)
    elif ratios_of(domains):
        notes.append(_interval_note(domains, unseen))

    infinite = [name for name, figure in ratios_of(domains).items() if figure.ratio == inf]
    if infinite:
        notes.append(f"warning: the perplexity is infinite on {', '.join(infinite)}; the model cannot be used there")
    if recovery is not None and not recovery.has_dense:
        notes += _without_teacher(recovery)
    return notes


def _has_vectors(domains: Mapping[str, DomainResult]) -> bool:
    """Return whether the vectors of an encoder were compared on any domain."""
    return any(domain.vectors is not None for domain in domains.values())


def _has_perplexity(domains: Mapping[str, DomainResult]) -> bool:
    """Return whether perplexity was measured on any domain."""
    return any(domain.perplexity is not None for domain in domains.values())


def _interval_note(domains: Mapping[str, DomainResult], unseen: UnseenResult | None) -> str:
    """Return the meaning of the intervals, and the lowest and the highest ratio of several domains."""
    document_counts = [domain.documents for domain in domains.values()]
    if unseen is not None:
        document_counts.append(unseen.documents)

    note = INTERVAL
    if any(0 < count < MANY_DOCUMENTS for count in document_counts):
        note += f"; {FEW_DOCUMENTS}"
    note += "."

    ratios = [figure.ratio or 0.0 for figure in ratios_of(domains).values()]
    if len(ratios) > 1:
        note += f" Domains differ: {min(ratios):.2f}× to {max(ratios):.2f}×."
    return note


def _ratio_table(
    domains: Mapping[str, DomainResult], unseen: UnseenResult | None, has_recovered: bool
) -> list[list[str]]:
    """Return perplexities relative to the original model.

    Args:
        domains: The results by domain.
        unseen: The results on unseen text.
        has_recovered: Whether there is a column for the recovered model.
    """
    figures = ratios_of(domains)
    rows = []

    for name, figure in _worst_first(figures)[:MAX_DOMAINS]:
        rows.append(_ratio_row(name, figure, domains[name].documents, has_recovered))
    if len(figures) > MAX_DOMAINS:
        rows.append([f"({len(figures) - MAX_DOMAINS} domains with lower losses)", ""])
        if has_recovered:
            rows[-1].append("")
    if len(figures) > 1:
        rows.append(_mean_row(figures, has_recovered))

    if unseen is not None and unseen.perplexity is not None:
        rows.append(_unseen_row(unseen, unseen.perplexity, has_recovered))
    if has_recovered:
        rows += _divergence_row(domains)

    if not rows:
        return []
    head = ["Perplexity relative to the original", "pruned"]
    if has_recovered:
        head.append("recovered")
    rows.insert(0, head)
    return rows


def _unseen_row(unseen: UnseenResult, figure: Figure, has_recovered: bool) -> list[str]:
    """Return the ratio of each model on unseen text, where the recovered model may not have been measured."""
    label = unseen_label(unseen)
    if not has_recovered or figure.recovered is not None:
        return _ratio_row(label, figure, unseen.documents, has_recovered)

    row = _ratio_row(label, figure, unseen.documents, has_recovered=False)
    row.append(UNKNOWN)
    return row


def _divergence_row(domains: Mapping[str, DomainResult]) -> list[list[str]]:
    """Return the row of the mean KL divergence of the pruned and the recovered model."""
    divergences = [domain.divergence for domain in domains.values() if domain.perplexity is not None]
    mean = mean_figure(figure for figure in divergences if figure is not None)

    if mean.pruned is None or mean.recovered is None:
        return []
    return [["KL to the original, mean (nats per token)", f"{mean.pruned:.3f}", f"{mean.recovered:.3f}"]]


def _worst_first(figures: Mapping[str, Figure]) -> list[tuple[str, Figure]]:
    """Return the figures of domains in their order; if there are many, the largest ratios come first."""
    items = list(figures.items())
    if len(items) > MAX_DOMAINS:
        items.sort(key=lambda item: -(item[1].ratio or 0.0))
    return items


def _ratio_row(label: str, figure: Figure, documents: int, has_recovered: bool) -> list[str]:
    """Return the ratio of each model to the original one. Only the last one has an interval."""
    last = times(figure.ratio or 0.0, figure.margin, documents)
    if not has_recovered:
        return [label, last]

    pruned = UNKNOWN
    if figure.pruned_ratio is not None:
        pruned = _like(figure.pruned_ratio, figure.margin)
    return [label, pruned, last]


def _like(ratio: float, margin: float | None) -> str:
    """Return a ratio with as many decimal places as a ratio with this margin."""
    return times(ratio, margin).partition(" ")[0]


def _mean_row(figures: Mapping[str, Figure], has_recovered: bool) -> list[str]:
    """Return the geometric mean over domains."""
    label = "mean over the calibration domains"
    mean, margin = mean_ratio(figures.values())
    last = times(mean, margin)
    if not has_recovered:
        return [label, last]

    pruned_figures = [Figure(dense=figure.dense, pruned=figure.pruned) for figure in figures.values()]
    pruned_mean, _ = mean_ratio(pruned_figures)
    return [label, _like(pruned_mean, margin), last]


def unseen_label(unseen: UnseenResult) -> str:
    """Return the name of unseen text with its origin."""
    if unseen.source == "model-written":
        return "unseen text (sampled from the original model)"
    if unseen.source:
        return f"unseen text ({unseen.source})"
    return "unseen text"


def _without_teacher(recovery: RecoveryReport) -> list[str]:
    """Return the effect of a training that was not measured against the original model."""
    figures = ratios_of(recovery.domains)
    if not figures:
        return []

    ratios = [f"{name} {times(figure.ratio or 0.0, figure.margin)}" for name, figure in figures.items()]
    return [f"Perplexity relative to the pruned model after training: {', '.join(ratios)}"]


def _vector_table(domains: Mapping[str, DomainResult]) -> list[list[str]]:
    """Return the similarity of an encoder's vectors to the original vectors, by domain."""
    has_perplexity = _has_perplexity(domains)
    head = ["Vectors compared with the original", "cosine", "neighbours kept"]
    if has_perplexity:
        head.append("missing text")

    rows = [head]
    for name, domain in domains.items():
        if domain.vectors is None:
            continue

        row = [name, _value(domain.vectors.cosine), _value(domain.vectors.neighbours)]
        if has_perplexity:
            row.append(UNKNOWN if domain.perplexity is None else ratio_text(domain.perplexity))
        rows.append(row)
    return rows


def _value(figure: Figure | None) -> str:
    """Return the last value of a figure with its interval."""
    if figure is None or figure.last is None:
        return UNKNOWN
    return with_margin(figure.last, figure.margin)


def vocabulary_lines(report: Report) -> list[str]:
    """Return the number of removed tokens, and the share of words that are split into more tokens."""
    trimmed = report.trimmed
    if trimmed is None:
        return []

    size = report.dense_widths[VOCAB]
    lines = [
        f"Vocabulary: {size:,} → {size - trimmed.tokens:,} entries; the removed ones are {trimmed.respelled:.2%} of "
        "the held-out tokens"
    ]

    unseen = report.unseen
    if unseen is not None and unseen.split_words is not None:
        lines.append(
            f"Words now split into more tokens: {unseen.split_words:.1%} of unseen text; technical text may reach "
            f"{technical_ratio(unseen.split_words):.2f}×"
        )
    if trimmed.unreadable:
        lines.append(f"Letters that can no longer be spelled, by script: {_by_count(trimmed.unreadable)}")
    if not report.domains:
        lines.append("No loss was measured, because the model reads more than text.")
    return lines


def language_lines(languages: Mapping[str, LanguageResult]) -> list[str]:
    """Return the cost of the requested languages, and the languages that got worse."""
    measured = {code: result for code, result in languages.items() if result.is_measured}
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
    worse = []
    for code, result in known.items():
        if result.is_worse(LANGUAGE_LIMIT):
            worse.append(_worse_language(code, result))

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
        return f"{LANGUAGES[code]} {result.cosine:.2f}"
    return f"{LANGUAGES[code]} {result.cost.ratio or 0.0:.2f}×"


def _language(code: str, result: LanguageResult) -> str:
    """Return the name of a language with its relative cost."""
    text = f"{LANGUAGES[code]} {times(result.cost.ratio or 0.0)}"

    if not result.is_known:
        text += " (not supported by the original model)"
    if result.vectors is not None and result.vectors.cosine is not None:
        text += f" (cosine {_value(result.vectors.cosine)})"
    return text


def training_lines(recovery: RecoveryReport) -> list[str]:
    """Return the cost of a training, and the reason if it ended early."""
    lines = [training_line(recovery)]
    if recovery.stopped:
        lines.append(recovery.stopped)
    return lines


def training_line(recovery: RecoveryReport) -> str:
    """Return the cost of a training, and the checkpoint that was kept."""
    cost = f"{recovery.tokens:,} tokens, {recovery.steps:,} steps, {recovery.seconds:,.0f} s"
    return f"Recovery: {cost}; {recovery.checkpoint_phrase}"


def recovery_lines(recovery: RecoveryReport) -> list[str]:
    """Return the printed form of a training whose pruning has no report."""
    if recovery.has_dense:
        lines = [aligned(_ratio_table(recovery.domains, recovery.unseen, has_recovered=True)), f"{INTERVAL}."]
    else:
        lines = _without_teacher(recovery)

    if recovery.answers is not None:
        lines.append(answers_line(recovery.answers))
        lines += answers_warning(recovery.answers)
    lines += training_lines(recovery)
    return lines


def next_command(
    verdict: Verdict | None, model: str, output: str, can_recover: bool, flags: Sequence[str] = ()
) -> str:
    """Return the command that a user should run next. It runs as it is.

    Args:
        verdict: The verdict on the result; None where no loss was measured.
        model: The id or the folder of the original model; empty if it is unknown.
        output: The folder of the result.
        can_recover: Whether `recover` can train the result, and has not trained it.
        flags: Flags that loading the models takes.
    """
    if can_recover and verdict is not None and verdict.level in (Level.OWN_DOMAINS, Level.RECOVER):
        words = ["structprune", "recover", output, f"{output.rstrip('/')}-recovered", "--teacher", model]
        return join([*words, *flags])

    words = ["structprune", "evaluate", output]
    if model:
        words += ["--against", model]
    return join([*words, *UNSEEN_TEXT, *flags])


def details(report: Report) -> Iterator[str]:
    """Yield the remarks that only the page and the card show."""
    for kind, by_layer in sorted(report.widths.items()):
        widths = list(by_layer.values())
        if len(set(widths)) > 1:
            yield f"{UNITS.get(kind, kind)} by layer: {' '.join(map(str, widths))}"

    if report.unseen is None:
        yield "Unseen text was not measured, because none was available."
    elif report.unseen.source == "built-in":
        yield SIMPLE_TEXT

    if report.trimmed is not None:
        yield from _trim_details(report.trimmed)
    if len(report.shapes) > 1:
        for shape in report.shapes:
            yield _shape_line(shape)


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
    divergence = "not finite"
    if isinstance(loss, (int, float)) and isfinite(loss):
        divergence = f"{loss:.4f}"
    return f"{verb}: {shape['proposed_by']} ({', '.join(parts)}), KL {divergence}"
