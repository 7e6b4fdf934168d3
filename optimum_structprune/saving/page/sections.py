"""The parts of the page: each says what was recorded, or in one line why there is nothing to say."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import isfinite
from shlex import join
from statistics import fmean, geometric_mean
from typing import Any

import yaml

from ...arch.spec import LAYER, MODEL
from ...config.domains import IN_MEMORY
from ...config.pruning import CONFIG_NAME
from ...record.details import Choice
from ...record.records import EVALUATION_NAME, Records
from ...record.text import readable_time
from ...system.memory import readable_size
from . import pictures


UNKNOWN = "–"
NOT_THEN = "the version of the package that made this result did not record it"


@dataclass(frozen=True)
class Table:
    """A table: the first column is text, the others are numbers.

    Attributes:
        head: The names of the columns.
        rows: The cells.
        caption: What it shows.
        folded: Whether it is shown only when it is asked for, where there is a picture of the same.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str
    folded: bool = True


@dataclass(frozen=True)
class Figure:
    """A picture with its caption.

    Attributes:
        svg: The SVG element.
        title: What it is of.
        caption: What it shows, in a sentence that can stand in its place.
        table: The same in numbers.
    """

    svg: str
    title: str
    caption: str
    table: Table


@dataclass
class Section:
    """A part of the page.

    Attributes:
        id: Its anchor.
        title: Its heading.
        text: Sentences under the heading.
        figures: Pictures.
        tables: Tables.
        code: Pairs of a label and a text that stays as it is.
        missing: What is left out, and why.
    """

    id: str
    title: str
    text: list[str] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    code: list[tuple[str, str]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    def show(self, draw: Callable[[], str], title: str, caption: str, table: Table) -> None:
        """Add a picture with its table, or the table alone where there is nothing to draw with."""
        if pictures.can_draw():
            self.figures.append(Figure(draw(), title, caption, table))
        else:
            self.tables.append(table)

    @property
    def shown(self) -> bool:
        """Whether it has a picture or a table."""
        return bool(self.figures or self.tables)


@dataclass(frozen=True)
class Tile:
    """One number of the summary.

    Attributes:
        label: What it is.
        value: The number.
        note: What it is compared with.
    """

    label: str
    value: str
    note: str


def tiles(records: Records) -> Iterator[Tile]:
    """The numbers that come first: parameters, bytes, perplexity, time."""
    report = records.report
    counts = report["parameters"]
    before, after = counts["before"], counts["after"]
    yield Tile("Parameters", _change(after / before), f"{before:,} → {after:,}")
    noted = {} if records.details is None else records.details.model.get("bytes", {})
    if records.dense_bytes and noted.get("after"):
        small = noted["after"]
        note = f"{readable_size(records.dense_bytes)} → {readable_size(small)}"
        yield Tile("Weights", _change(small / records.dense_bytes), note)
    if broken := _broken(records):
        yield Tile("Perplexity", "infinite", f"on {', '.join(broken)}")
    for label, perplexities, last in _held_out(records):
        mean = geometric_mean(values[last] / values["dense"] for values in perplexities.values())
        worst = max(perplexities, key=lambda name: perplexities[name][last] / perplexities[name]["dense"])
        ratio = perplexities[worst][last] / perplexities[worst]["dense"]
        note = (
            f"geometric mean over {_count(len(perplexities), 'domain')}; worst {worst}, ×\N{NO-BREAK SPACE}{ratio:.3f}"
        )
        yield Tile(label, f"× {mean:.3f}", note)
    if errors := report.get("output_error"):
        worst = max(errors, key=lambda name: errors[name] or 0)
        yield Tile("Output error", _number(errors[worst], 4), f"of the hidden states' variance, worst {worst}")
    if spent := report.get("seconds"):
        note = "since it went on" if records.details is not None and records.details.resumed else "in all stages"
        yield Tile("Time", readable_time(sum(spent.values())), note)


def _held_out(records: Records) -> Iterator[tuple[str, dict[str, dict[str, float]], str]]:
    """The perplexities on held-out text that are known beside the dense model's, and the last model of each."""
    if found := _pruned(records):
        yield "Perplexity, pruned", found, "pruned"
    if found := _recovered(records):
        yield "Perplexity, recovered", found, "recovered"


def _pruned(records: Records) -> dict[str, dict[str, float]]:
    found = {
        name: {"dense": values["before"], "pruned": values["after"]}
        for name, values in records.report.get("perplexity", {}).items()
    }
    return _finite(found)


def _recovered(records: Records) -> dict[str, dict[str, float]]:
    found = dict((records.recovery or {}).get("perplexity", {}))
    return _finite({name: values for name, values in found.items() if "dense" in values})


def _broken(records: Records) -> list[str]:
    """The domains with a perplexity that is no finite number, which JSON has as null."""
    found = [*records.report.get("perplexity", {}).items(), *(records.recovery or {}).get("perplexity", {}).items()]
    return sorted({name for name, values in found if None in values.values()})


def _finite(perplexities: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    return {
        name: dict(values)
        for name, values in perplexities.items()
        if all(value is not None and isfinite(value) and value > 0 for value in values.values())
    }


def what_and_why(records: Records) -> Section:
    """What went, and what decided it."""
    report, config = records.report, records.config
    part = Section("what", "What went and why")
    for kind, by_layer in sorted(report["widths"].items()):
        kept, full = list(by_layer.values()), report["dense_widths"][kind]
        low, high, change = min(kept), max(kept), _change(fmean(kept) / full)
        if str(MODEL) in by_layer:
            part.text.append(f"{kind}: {low:,} of {full:,} units stay ({change}).")
        elif low == high:
            part.text.append(f"{kind}: each layer keeps {low:,} of {full:,} units ({change}).")
        else:
            mean = f"{fmean(kept):,.1f}"
            part.text.append(
                f"{kind}: layers keep {low:,} to {high:,} of {full:,} units, {mean} in the mean ({change})."
            )
    if records.plan is not None and (left := records.plan.keep.get((MODEL, LAYER))) is not None:
        gone = [str(layer) for layer in range(report["dense_widths"][LAYER]) if layer not in left]
        part.text.append(f"Whole layers that went: {', '.join(gone)}.")
    if config is None:
        part.missing.append(f"Why: there is no {CONFIG_NAME} beside the model.")
        return part
    asked = [f"{name}={config[name]}" for name in ("sparsity", "widths", "budget") if config.get(name) is not None]
    tokens = report.get("calibration_tokens") or {}
    named = ", ".join(f"{name} ({count:,} tokens)" for name, count in tokens.items())
    part.text += [
        f"Asked for: {', '.join(asked) or 'nothing'}, spread by allocation={config.get('allocation')}, in "
        f"{_count(config.get('rounds', 1), 'round')}.",
        f"Units were scored by {report['criterion']}; kept weights were refitted by {config.get('refit')}.",
        *([f"Calibrated on {named}."] if named else []),
        *([f"Limit: max_perplexity_ratio={limit}."] if (limit := config.get("max_perplexity_ratio")) else []),
    ]
    return part


def quality(records: Records) -> Section:
    """Perplexity by domain, dense, pruned and recovered: held-out and other text apart."""
    part = Section("quality", "Is it still good")
    report = records.report
    if report.get("perplexity"):
        part.text.append("Held-out text is of the domains that were calibrated on, and was not calibrated on itself.")
    if broken := _broken(records):
        part.text.append(f"Without {', '.join(broken)}, where a perplexity is infinite: the model is of no use there.")
    _add_perplexities(part, "held-out", "Held-out text of the calibration", _pruned(records), ("pruned",))
    if records.recovery is None:
        part.missing.append("Recovered: there was no training after pruning.")
    elif not (found := _recovered(records)):
        part.missing.append("Recovered, beside dense: the training had no dense model to compare with.")
    else:
        _add_perplexities(part, "recovered", "Held-out text of the recovery", found, ("pruned", "recovered"))
        tokens, spent = records.recovery.get("tokens", 0), records.recovery.get("seconds", 0.0)
        part.text.append(f"Recovery trained on {tokens:,} tokens, in {readable_time(spent)}.")
    if errors := report.get("output_error"):
        rows = [[name, _number(error, 4)] for name, error in errors.items()]
        part.tables.append(Table(["domain", "output error"], rows, "Error of the last hidden states, held-out text"))
    _add_evaluation(part, records)
    if rounds := report.get("rounds"):
        part.tables.append(_rounds(rounds))
    return part


def _add_perplexities(
    part: Section, name: str, title: str, found: Mapping[str, Mapping[str, float]], marks: Sequence[str]
) -> None:
    if not found:
        return
    models, last = ("dense", *marks), marks[-1]
    rows = [
        [domain, *(f"{values[which]:.2f}" for which in models), f"× {values[last] / values['dense']:.3f}"]
        for domain, values in found.items()
    ]
    if len(rows) > 1:
        means = {which: geometric_mean(values[which] for values in found.values()) for which in models}
        mean_ratio = f"× {means[last] / means['dense']:.3f}"
        rows.append(["geometric mean", *(f"{mean:.2f}" for mean in means.values()), mean_ratio])
    part.show(
        lambda: pictures.ratios(name, found, marks),
        title,
        "Perplexity of each domain, as a multiple of the dense model's.",
        Table(["perplexity", *models, "ratio"], rows, title, folded=False),
    )


def _add_evaluation(part: Section, records: Records) -> None:
    evaluation = records.evaluation
    if evaluation is None:
        part.missing.append(
            f"Unseen text and tasks: nothing was measured. `structprune report {records.output} DENSE --domain "
            f"NAME=SOURCE` measures it, and `structprune evaluate … --json {records.output}/{EVALUATION_NAME}` too."
        )
        return
    last = "pruned" if records.recovery is None else "recovered"
    perplexities, shared = evaluation.get("perplexity", {}), evaluation.get("shared")
    for number, (title, names) in enumerate(_by_kinship(list(perplexities), shared).items()):
        there = {name: perplexities[name] for name in names}
        beside = {
            name: {"dense": values["dense"], last: values["model"]}
            for name, values in there.items()
            if values.get("dense") is not None
        }
        _add_perplexities(part, f"evaluated-{number}", title, _finite(beside), (last,))
        if alone := [[name, _number(values["model"])] for name, values in there.items() if name not in beside]:
            part.tables.append(Table(["perplexity", last], alone, title, folded=False))
    rows = [
        [f"{task}, {metric}", *(_number(scores.get(which, {}).get(metric), 3) for which in ("dense", "model"))]
        for task, scores in evaluation.get("tasks", {}).items()
        for metric in scores["model"]
        if metric != "items"
    ]
    if rows:
        part.tables.append(Table(["task", "dense", last], rows, "Tasks", folded=False))
    part.text += [f"Warning: {warning}" for warning in evaluation.get("warnings", [])]


def _by_kinship(names: Sequence[str], shared: Sequence[str] | None) -> dict[str, list[str]]:
    """The domains of an evaluation by what they have to do with the calibration, under the heading of each kind."""
    if shared is None:
        return {"Evaluated text; whether it was calibrated on is not known": list(names)}
    return {
        "Unseen text": [name for name in names if name not in shared],
        "Text that the calibration shares": [name for name in names if name in shared],
    }


def _rounds(rounds: Sequence[Mapping[str, Any]]) -> Table:
    rows = []
    for number, one in enumerate(rounds, start=1):
        ratios = {name: ratio for name, ratio in one.get("perplexity_ratio", {}).items() if ratio is not None}
        worst = max(ratios, key=lambda name: ratios[name]) if ratios else None
        held = {True: "yes", False: "no", None: UNKNOWN}[one.get("holds")]
        widths = ", ".join(f"{name} {_range(width)}" for name, width in one["widths"].items())
        rows.append([f"{number}: {widths}", UNKNOWN if worst is None else f"{worst} × {ratios[worst]:.3f}", held])
    return Table(["round", "worst perplexity ratio", "within the limit"], rows, "Rounds", folded=False)


def _range(width: Any) -> str:
    values = list(width.values()) if isinstance(width, Mapping) else [width]
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,}–{high:,}"


def kept_widths(records: Records) -> Section:
    """How many units each layer keeps."""
    part = Section("widths", "Widths")
    for kind, by_layer in sorted(records.report["widths"].items()):
        kept, full = {int(layer): width for layer, width in by_layer.items()}, records.report["dense_widths"][kind]
        if list(kept) == [MODEL]:
            continue  # the first section has what belongs to the whole model
        rows = [[str(layer), f"{width:,}", _change(width / full)] for layer, width in kept.items()]
        part.show(
            partial(pictures.widths, f"width-{kind}", kept, full),
            kind,
            f"The units that each layer keeps, of {full:,}.",
            Table(["layer", "kept", "change"], rows, kind),
        )
    if not part.shown:
        part.missing.append("Nothing was removed inside the layers.")
    return part


def scored(records: Records) -> Section:
    """The distributions of the scores, and where they were cut."""
    part = Section("scores", "Scores and the cut")
    for kind, choices in _choices(records, part, "The scores"):
        part.show(
            partial(pictures.scores, f"scores-{kind}", choices),
            kind,
            "How many units have which score, one row per layer. What lies left of the line was removed.",
            Table(
                ["layer", "scored", "kept", "removed"],
                [
                    [str(layer), f"{one.scored:,}", f"{one.kept:,}", f"{one.scored - one.kept:,}"]
                    for layer, one in choices.items()
                ],
                kind,
            ),
        )
    if part.shown:
        part.text.append(
            "Units of higher score are kept. Where many units crowd about the line, a little more or less text could "
            "have chosen others."
        )
        if int((records.config or {}).get("rounds", 1)) > 1:
            part.text.append("These are the scores of the last round that removed units in the layer.")
    return part


def disagreement(records: Records) -> Section:
    """Where the domains disagree about units."""
    part = Section("domains", "Where domains disagree")
    domains = [] if records.details is None else records.details.domains
    if records.details is not None and len(domains) < 2:
        part.missing.append("One domain has nothing to disagree with.")
        return part
    for kind, choices in _choices(records, part, "The domains' rankings"):
        known = {layer: one for layer, one in choices.items() if one.agreement}
        if not known:
            part.missing.append(f"{kind}: some domain has no tokens there, or all its units are alike.")
            continue
        part.show(
            partial(pictures.agreement, f"agree-{kind}", domains, known),
            kind,
            "Rank correlation of how much output each unit carries in two domains. At 1 they need the same units; the "
            "darker, the less.",
            _pairs(kind, domains, known),
        )
    return part


def _pairs(kind: str, domains: Sequence[str], known: Mapping[int, Choice]) -> Table:
    """Pairs of domains, those first that agree least."""
    pairs = [(a, b) for a in range(len(domains)) for b in range(a + 1, len(domains))]
    found = []
    for number, (a, b) in enumerate(pairs):
        values = {layer: one.agreement[number] for layer, one in known.items()}
        layer = min(values, key=lambda layer: values[layer])
        found.append((fmean(values.values()), f"{domains[a]} – {domains[b]}", values[layer], layer))
    rows = [[pair, f"{mean:.2f}", f"{least:.2f}", str(layer)] for mean, pair, least, layer in sorted(found)]
    return Table(["domains", "mean", "least", "in layer"], rows, kind)


def refitted(records: Records) -> Section:
    """The reconstruction error of each layer without the refit and with it."""
    part = Section("refit", "What the refit makes up for")
    for kind, choices in _choices(records, part, "The errors"):
        known = {layer: one for layer, one in choices.items() if one.error and one.error[0] > 0}
        if not known:
            part.missing.append(f"{kind}: no Gram matrix was gathered, from which the error follows.")
            continue
        rows = [
            [str(layer), *(f"{error:.4f}" for error in one.error), _change(one.error[1] / one.error[0], 0)]
            for layer, one in known.items()
        ]
        part.show(
            partial(pictures.errors, f"error-{kind}", known),
            kind,
            "Squared error of what the consumers of these units give out, relative to their dense output.",
            Table(["layer", "without refit", "with refit", "change"], rows, kind),
        )
    if part.shown:
        part.text.append(
            "The error is that of the calibration text, from the moments that the refit used. With error feedback it "
            "includes the share of the earlier layers' error that the refit was asked to make up for."
        )
    return part


def sensitivity(records: Records) -> Section:
    """The loss of the model with one layer pruned alone, where it was measured."""
    part = Section("sensitivity", "Measured loss of each layer")
    if records.details is None:
        part.missing.append(f"The losses: {NOT_THEN}.")
        return part
    for kind, measured in sorted(records.details.sensitivity.items()):
        trials = {
            layer: {units: losses for units, losses in by_units.items() if None not in losses}
            for layer, by_units in measured.items()
        }
        full = records.report["dense_widths"].get(kind) or max(max(by_units) for by_units in trials.values())
        rows = [
            [str(layer), f"{units:,}", f"{fmean(losses):.4f}", f"{max(losses):.4f}"]
            for layer, by_units in trials.items()
            for units, losses in by_units.items()
        ]
        part.show(
            partial(pictures.losses, f"loss-{kind}", trials, full),
            kind,
            "Loss of the model with a part of the units of one layer gone and all other layers dense: the mean over "
            "the domains, and their range.",
            Table(["layer", "removed", "mean", "worst domain"], rows, f"{kind}, nats per token"),
        )
    if not part.shown:
        part.missing.append("Not measured: that takes allocation=sensitivity.")
    return part


def cost(records: Records) -> Section:
    """Time and memory by stage."""
    part = Section("cost", "Time and memory")
    spent = records.report.get("seconds") or {}
    if not spent:
        part.missing.append("No stage was timed.")
        return part
    peaks = {} if records.details is None else records.details.memory
    kinds = sorted({kind for by_kind in peaks.values() for kind in by_kind})
    rows = [
        [
            stage,
            readable_time(seconds),
            *(readable_size(peaks[stage][kind]) if kind in peaks.get(stage, {}) else UNKNOWN for kind in kinds),
        ]
        for stage, seconds in spent.items()
    ]
    head = ["stage", "time", *(f"{kind.upper()} memory by then" for kind in kinds)]
    part.show(
        lambda: pictures.seconds("seconds", spent),
        "By stage",
        "Seconds spent in each stage.",
        Table(head, rows, "By stage", folded=False),
    )
    if kinds:
        part.text.append("Memory is the most that the first process had held at a time when the stage ended.")
    else:
        part.missing.append(f"Memory: {NOT_THEN if records.details is None else 'it cannot be read on this system'}.")
    if by_domain := records.report.get("domain_seconds"):
        said = ", ".join(f"{name} {readable_time(seconds)}" for name, seconds in by_domain.items())
        part.text.append(f"Of the time, calibration took: {said}.")
    if records.details is not None and records.details.resumed:
        part.text.append("The run went on where another was stopped: these are the times of the rest.")
    return part


def repeat(records: Records) -> Section:
    """The commands that repeat the run, and the records that they need."""
    part = Section("repeat", "Repeat it")
    dense, out = records.dense or "DENSE", records.output
    if not records.dense:
        part.missing.append("The name of the dense model was not recorded: put it in the place of DENSE.")
    sources = [domain.get("source", "") for domain in (records.config or {}).get("domains") or []]
    given = [entry["name"] for entry in (records.manifest or {}).get("domains", []) if not entry.get("origin")]
    lines = [
        join(["structprune", "prune", dense, f"{out}-again", "--config", f"{out}/{CONFIG_NAME}", *_dtype(records)]),
        join(["structprune", "evaluate", out, "--against", dense, "--domain", "NAME=SOURCE"]),
        join(["structprune", "report", out, dense]),
    ]
    if records.config is None or given or any(str(source).startswith(IN_MEMORY) for source in sources):
        lines = lines[1:]
        part.missing.append("The pruning itself: it read text that only the program had which called it.")
    part.code.append(("Commands", "\n".join(lines)))
    if records.config is not None:
        part.code.append((CONFIG_NAME, yaml.safe_dump(dict(records.config), sort_keys=False, allow_unicode=True)))
    if records.manifest is None:
        part.missing.append("The manifest: there is none beside the model.")
        return part
    rows = [
        [
            f"{entry['name']}: {entry['origin'].get('source', 'given inputs')}",
            f"{entry['weight']:.3f}",
            f"{entry['calibration_tokens']:,}",
            f"{entry['heldout_tokens']:,}",
            f"{len(entry['documents']):,}",
            entry.get("samples_sha256", "")[:12],
        ]
        for entry in records.manifest["domains"]
    ]
    head = ["domain", "weight", "tokens", "held out", "documents", "SHA-256"]
    part.tables.append(Table(head, rows, "Manifest: what was calibrated on", folded=False))
    versions = ", ".join(f"{name} {version}" for name, version in records.manifest.get("versions", {}).items())
    part.text.append(
        f"Seed {records.manifest['seed']}, samples of {records.manifest['seq_length']} tokens; {versions}."
    )
    return part


SECTIONS: tuple[Callable[[Records], Section], ...] = (
    what_and_why,
    quality,
    kept_widths,
    scored,
    disagreement,
    refitted,
    sensitivity,
    cost,
    repeat,
)


def _choices(records: Records, part: Section, what: str) -> Iterator[tuple[str, Mapping[int, Choice]]]:
    """The choices by kind of space; where there are none, the section says why."""
    if records.details is None:
        part.missing.append(f"{what}: {NOT_THEN}.")
    elif not records.details.choices:
        part.missing.append(f"{what}: nothing was removed inside the layers, or an earlier version had begun the run.")
    else:
        yield from sorted(records.details.choices.items())


def _dtype(records: Records) -> list[str]:
    dtype = records.details.model.get("dtype") if records.details is not None else None
    return ["--dtype", dtype] if dtype else []


def _change(ratio: float, digits: int = 1) -> str:
    return f"{ratio - 1:+.{digits}%}".replace("-", "−")


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _number(value: Any, digits: int = 2) -> str:
    return UNKNOWN if value is None else f"{value:.{digits}f}"
