"""Makes the page about a result from its records, and writes it beside the model."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from itertools import combinations
from pathlib import Path
from shlex import join
from statistics import fmean, geometric_mean
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup, escape

from .. import __version__
from ..arch.spec import LAYER, MODEL
from ..config.domains import IN_MEMORY
from ..config.fields import to_yaml
from ..config.pruning import CONFIG_NAME
from ..errors import StructPruneError, one_line
from ..plain_json import replace_text
from ..record.details import DETAILS_NAME, Choice
from ..record.facts import UNKNOWN, Facts, cells, facts_of, perplexity_facts, quality_rows, remarks, size_rows
from ..record.records import EVALUATION_NAME, Records
from ..record.text import readable_time
from ..system.memory import readable_size


PAGE_NAME = "report.html"
# So many series of a chart have a colour of their own; of more, evenly spread ones are drawn.
MOST_SERIES = 3


@dataclass(frozen=True)
class Table:
    """A table of text cells under a head; `bars` are shares from 0 to 1, drawn at the end of each row."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    bars: Sequence[float] = ()


@dataclass(frozen=True)
class Chart:
    """Columns over the layers: shares from 0 to 1 of the height `top`, by series, each in front of the one before;
    and the same in numbers.
    """

    caption: str
    series: Mapping[str, Sequence[float]]
    top: str
    table: Table


@dataclass
class Section:
    """A part of the page: sentences, charts, tables, texts that stay as they are, and what is left out and why."""

    id: str
    title: str
    text: list[str] = field(default_factory=list)
    charts: list[Chart] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    code: list[tuple[str, str]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


def page(records: Records) -> str:
    """The page of one result: HTML that needs nothing else."""
    try:
        return _template().render(
            records=records,
            tiles=list(_tiles(records)),
            sections=[section(records) for section in (_what, _quality, _widths, _chosen, _repeat)],
            version=__version__,
            coded=_coded,
        )
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise StructPruneError(f"{records.output}: a record is not what this package writes: {error!r}.") from error


@cache
def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("optimum_structprune.saving", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.jinja")


def _coded(text: str) -> Markup:
    """A sentence as HTML, with what stands between backticks as code."""
    parts = text.split("`")
    tags = [
        Markup("<code>{}</code>").format(part) if number % 2 else escape(part) for number, part in enumerate(parts)
    ]
    return Markup("").join(tags)


def write_report(folder: str | Path, output: str | Path | None = None, dense: str = "") -> Path:
    """Write the page of a result into its folder, in one step.

    Args:
        folder: The folder of a pruned model.
        output: The name that is shown for it; by default its own.
        dense: The name of the dense model; by default what the run has noted.

    Returns:
        The path of the page.

    Raises:
        StructPruneError: If the folder has no report, or a record cannot be read.
    """
    path = Path(folder, PAGE_NAME)
    replace_text(path, page(Records.read(folder, output, dense)))
    return path


def leave_page(folder: str | Path, output: str | Path) -> None:
    """Write the page of a result that is being saved; a page that cannot be made only gives a warning."""
    with only_warning(output, PAGE_NAME):
        write_report(folder, output)


@contextmanager
def only_warning(output: str | Path, name: str) -> Iterator[None]:
    """A file beside a result that cannot be made inside `with` only gives a warning."""
    try:
        yield
    except Exception as error:  # hours of work are not given up for a page about them
        warnings.warn(f"{output} gets no {name}: {one_line(error)}", stacklevel=4)


def _tiles(records: Records) -> Iterator[tuple[str, str, str]]:
    """The numbers that come first, each with its label and what it is compared with."""
    report, details = records.report, records.details
    counts = report["parameters"]
    yield "Parameters", _change(counts["after"] / counts["before"]), f"{counts['before']:,} → {counts['after']:,}"
    if sizes := details.model.get("bytes"):
        note = f"{readable_size(sizes['before'])} → {readable_size(sizes['after'])}"
        yield "Weights", _change(sizes["after"] / sizes["before"]), note
    if broken := _broken(records):
        yield "Perplexity", "infinite", f"on {', '.join(broken)}"
    for label, models in (("Perplexity, pruned", _run(records)), ("Perplexity, recovered", _training(records))):
        ratios = _ratios(models)
        if ratios:
            worst = max(ratios, key=lambda name: ratios[name])
            note = f"geometric mean over {_count(len(ratios), 'domain')}; worst {worst}, × {ratios[worst]:.3f}"
            yield label, f"× {geometric_mean(ratios.values()):.3f}", note
    if errors := report.get("output_error"):
        worst = max(errors, key=lambda name: errors[name] or 0)
        yield "Output error", f"{errors[worst] or 0:.4f}", f"of the hidden states' variance, worst {worst}"
    if spent := report.get("seconds"):
        note = "since it went on" if details.resumed else "in all stages"
        yield "Time", readable_time(sum(spent.values())), note


def _run(records: Records) -> dict[str, Facts]:
    facts = facts_of(records.report)
    return {"dense": facts["before"], "pruned": facts["after"]}


def _training(records: Records) -> dict[str, Facts]:
    return perplexity_facts(records.recovery.get("perplexity") or {})


def _ratios(models: Mapping[str, Facts]) -> dict[str, float]:
    """Perplexities of the last model as multiples of the dense one's, by domain, where both are finite."""
    if "dense" not in models:
        return {}
    domains = [name for facts in models.values() for name in facts.perplexity]
    by_label = {row.label: row.ratio for row in quality_rows(list(models.values()))}
    ratios = {name: by_label[f"perplexity {name}"] for name in domains}
    return {name: ratio for name, ratio in ratios.items() if ratio is not None}


def _broken(records: Records) -> list[str]:
    """The domains with a perplexity that is no finite number, which JSON has as null."""
    measured = [*(records.report.get("perplexity") or {}).items(), *(records.recovery.get("perplexity") or {}).items()]
    return sorted({name for name, by_model in measured if None in by_model.values()})


def _what(records: Records) -> Section:
    report, config = records.report, records.config
    part = Section("what", "What went and why")
    models = _run(records)
    for facts, when in zip(models.values(), ("before", "after"), strict=True):
        facts.weights = records.details.model.get("bytes", {}).get(when)
    part.tables.append(Table("Size", *_head_and_rows(cells(list(models), size_rows(list(models.values()))))))
    if records.plan is not None and (stay := records.plan.keep.get((MODEL, LAYER))) is not None:
        gone = [str(layer) for layer in range(report["dense_widths"][LAYER]) if layer not in stay]
        part.text.append(f"Whole layers that went: {', '.join(gone)}.")
    if not config:
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


def _quality(records: Records) -> Section:
    """Perplexity by domain, dense, pruned and recovered: held-out and other text apart."""
    part = Section("quality", "Is it still good")
    if records.report.get("perplexity"):
        part.text.append("Held-out text is of the domains that were calibrated on, and was not calibrated on itself.")
    if broken := _broken(records):
        part.text.append(f"On {', '.join(broken)} a perplexity is infinite: the model is of no use there.")
    _add_quality(part, "Held-out text of the calibration", _run(records))
    if not records.recovery:
        part.missing.append("Recovered: there was no training after pruning.")
    else:
        _add_quality(part, "Held-out text of the recovery", _training(records))
        tokens, spent = records.recovery.get("tokens", 0), records.recovery.get("seconds", 0.0)
        part.text.append(f"Recovery trained on {tokens:,} tokens, in {readable_time(spent)}.")
    evaluation = records.evaluation
    if not evaluation:
        part.missing.append(
            f"Unseen text and tasks: nothing was measured. `structprune report {records.output} DENSE --domain "
            f"NAME=SOURCE` measures it, and `structprune evaluate … --json {records.output}/{EVALUATION_NAME}` too."
        )
    perplexities, shared = evaluation.get("perplexity", {}), evaluation.get("shared")
    last = "recovered" if records.recovery else "pruned"
    for title, names in _by_kinship(list(perplexities), shared).items():
        measured = perplexity_facts({name: perplexities[name] for name in names})
        _add_quality(part, title, {last if name == "model" else name: facts for name, facts in measured.items()})
    tasks = evaluation.get("tasks", {})
    whose = [name for name in ("dense", "model") if any(name in scores for scores in tasks.values())]
    of_tasks = {name: Facts(tasks={task: scores.get(name, {}) for task, scores in tasks.items()}) for name in whose}
    _add_quality(part, "Tasks", {last if name == "model" else name: facts for name, facts in of_tasks.items()})
    part.text += [f"Warning: {warning}" for warning in evaluation.get("warnings", [])]
    return part


def _add_quality(part: Section, caption: str, models: Mapping[str, Facts]) -> None:
    """Add a table of perplexities and scores, with bars as long as the ratios, the longest over the whole width."""
    if not models or not (rows := quality_rows(list(models.values()))):
        return
    ratios = [row.ratio or 0.0 for row in rows]
    bars = [ratio / max(ratios) for ratio in ratios] if any(ratios) else []
    part.tables.append(Table(caption, *_head_and_rows(cells(list(models), rows)), bars))


def _by_kinship(names: Sequence[str], shared: Sequence[str] | None) -> dict[str, list[str]]:
    """The domains of an evaluation by what they have to do with the calibration, under the heading of each kind."""
    if shared is None:
        return {"Evaluated text; whether it was calibrated on is not known": list(names)}
    return {
        "Unseen text": [name for name in names if name not in shared],
        "Text that the calibration shares": [name for name in names if name in shared],
    }


def _widths(records: Records) -> Section:
    """How many units each layer keeps."""
    part = Section("widths", "Widths")
    for kind, by_layer in sorted(records.report["widths"].items()):
        if list(by_layer) == [str(MODEL)]:
            continue  # the first section has what belongs to the whole model
        full = records.report["dense_widths"][kind]
        rows = [[layer, f"{width:,}", _change(width / full)] for layer, width in by_layer.items()]
        series = {"removed": [1.0] * len(rows), "kept": [width / full for width in by_layer.values()]}
        table = Table(f"{kind} by layer", ["layer", "kept", "change"], rows)
        part.charts.append(Chart(f"{kind}: the units that each layer keeps", series, f"{full:,} units", table))
    if not part.charts:
        part.missing.append("Nothing was removed inside the layers.")
    return part


def _chosen(records: Records) -> Section:
    """The errors that pruning left in each layer, where the domains disagree, and the losses that were measured."""
    part = Section("chosen", "How units were chosen")
    details = records.details
    if not details.choices:
        part.missing.append(f"Errors: nothing was removed inside the layers, or there is no {DETAILS_NAME}.")
    for kind, choices in sorted(details.choices.items()):
        errors = {layer: choice.error for layer, choice in choices.items() if any(choice.error)}
        if errors:
            part.charts.append(_error_chart(kind, errors))
        else:
            part.missing.append(f"{kind}: no Gram matrix was gathered, from which the error follows.")
        if agreements := {layer: choice for layer, choice in choices.items() if choice.agreement}:
            part.tables.append(_agreement(kind, details.domains, agreements))
    if part.charts:
        part.text.append(
            "Errors are those of the calibration text: the squared error of what the consumers of the units give out, "
            "relative to their dense output. With error feedback they include what earlier layers left over."
        )
    if part.tables:
        part.text.append(
            "Agreement is the rank correlation of how much output each unit carries in two domains: at 1 they need "
            "the same units."
        )
    for kind, by_layer in sorted(details.sensitivity.items()):
        losses = {
            layer: {
                units: [loss for loss in of if loss is not None]
                for units, of in by_units.items()
                if of and None not in of
            }
            for layer, by_units in by_layer.items()
        }
        if any(losses.values()):
            part.charts.append(_loss_chart(kind, losses))
    if not details.sensitivity:
        part.missing.append("Losses of single layers: not measured; that takes allocation=sensitivity.")
    part.text += [f"{said}." for said in remarks(records.report)]
    return part


def _error_chart(kind: str, errors: Mapping[int, tuple[float, ...]]) -> Chart:
    top = max(max(error) for error in errors.values())
    names = ("without refit", "with refit")
    rows = [
        [str(layer), *(f"{value:.4f}" for value in error), _change(error[1] / error[0], 0) if error[0] else UNKNOWN]
        for layer, error in errors.items()
    ]
    return Chart(
        f"{kind}: error of each layer",
        {name: [error[place] / top for error in errors.values()] for place, name in enumerate(names)},
        f"{top:.4f} of the output",
        Table(f"{kind}, error by layer", ["layer", *names, "change"], rows),
    )


def _agreement(kind: str, domains: Sequence[str], choices: Mapping[int, Choice]) -> Table:
    """Pairs of domains, those first that agree least."""
    pairs = []
    for place, (a, b) in enumerate(combinations(domains, 2)):
        by_layer = {layer: choice.agreement[place] for layer, choice in choices.items()}
        layer = min(by_layer, key=lambda layer: by_layer[layer])
        pairs.append((fmean(by_layer.values()), f"{a} – {b}", by_layer[layer], layer))
    rows = [[pair, f"{mean:.2f}", f"{least:.2f}", str(layer)] for mean, pair, least, layer in sorted(pairs)]
    bars = [max(mean, 0.0) for mean, *_ in sorted(pairs)]
    return Table(f"{kind}: agreement of domains", ["domains", "mean", "least", "in layer"], rows, bars)


def _loss_chart(kind: str, losses: Mapping[int, Mapping[int, Sequence[float]]]) -> Chart:
    """The loss of the model with some units of one layer gone, one series for each number of them."""
    counts = sorted({units for by_units in losses.values() for units in by_units}, reverse=True)
    means = {layer: {units: fmean(of) for units, of in by_units.items()} for layer, by_units in losses.items()}
    counts = counts[:: -(-len(counts) // MOST_SERIES)]
    top = max(mean for by_units in means.values() for mean in by_units.values()) or 1.0
    rows = [
        [str(layer), f"{units:,}", f"{means[layer][units]:.4f}", f"{max(of):.4f}"]
        for layer, by_units in losses.items()
        for units, of in by_units.items()
    ]
    return Chart(
        f"{kind}: loss of the model with units of one layer gone",
        {
            f"{units:,} removed": [max(by_units.get(units, 0.0), 0.0) / top for by_units in means.values()]
            for units in counts
        },
        f"{top:.4f} nats per token",
        Table(f"{kind}, nats per token", ["layer", "removed", "mean", "worst domain"], rows),
    )


def _repeat(records: Records) -> Section:
    """What it cost, the commands that repeat the run, and the records that they need."""
    part = Section("repeat", "What it cost, and how to repeat it")
    _add_cost(part, records)
    dense, out, config = records.dense or "DENSE", records.output, records.config
    if not records.dense:
        part.missing.append("The name of the dense model was not recorded: put it in the place of DENSE.")
    sources = [domain.get("source", "") for domain in config.get("domains") or []]
    entries = records.manifest.get("domains", [])
    dtype = ["--dtype", records.details.model["dtype"]] if records.details.model.get("dtype") else []
    lines = [
        join(["structprune", "prune", dense, f"{out}-again", "--config", f"{out}/{CONFIG_NAME}", *dtype]),
        join(["structprune", "evaluate", out, "--against", dense, "--domain", "NAME=SOURCE"]),
        join(["structprune", "report", out, dense]),
    ]
    in_memory = any(str(source).startswith(IN_MEMORY) for source in sources)
    if not config or in_memory or any(not entry.get("origin") for entry in entries):
        lines = lines[1:]
        part.missing.append("The pruning itself: it read text that only the program had which called it.")
    part.code.append(("Commands", "\n".join(lines)))
    if config:
        part.code.append((CONFIG_NAME, to_yaml(dict(config))))
    if not entries:
        part.missing.append("The manifest: there is none beside the model.")
        return part
    head = ["domain", "weight", "tokens", "held out", "documents", "SHA-256"]
    rows = [
        [
            f"{entry['name']}: {entry['origin'].get('source', 'given inputs')}",
            f"{entry['weight']:.3f}",
            *(f"{entry[name]:,}" for name in ("calibration_tokens", "heldout_tokens")),
            f"{len(entry['documents']):,}",
            entry["samples_sha256"][:12],
        ]
        for entry in entries
    ]
    part.tables.append(Table("Manifest: what was calibrated on", head, rows))
    versions = ", ".join(f"{name} {version}" for name, version in records.manifest.get("versions", {}).items())
    seed, length = records.manifest["seed"], records.manifest["seq_length"]
    part.text.append(f"Seed {seed}, samples of {length} tokens; {versions}.")
    return part


def _add_cost(part: Section, records: Records) -> None:
    """Add time and memory by stage."""
    spent: Mapping[str, Any] = records.report.get("seconds") or {}
    if not spent:
        part.missing.append("No stage was timed.")
        return
    peaks = records.details.memory
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
    top = max(spent.values()) or 1.0
    part.tables.append(Table("Time and memory by stage", head, rows, [seconds / top for seconds in spent.values()]))
    if kinds:
        part.text.append("Memory is the most that the first process had held at a time when the stage ended.")
    if records.details.resumed:
        part.text.append("The run went on where another was stopped: these are the times of the rest.")


def _head_and_rows(lines: Sequence[Sequence[str]]) -> tuple[Sequence[str], Sequence[Sequence[str]]]:
    return lines[0], lines[1:]


def _change(ratio: float, digits: int = 1) -> str:
    return f"{ratio - 1:+.{digits}%}".replace("-", "−")


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
