"""Makes the page about a result from its records, and writes it beside the model."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from pathlib import Path
from shlex import join
from statistics import fmean, geometric_mean

from jinja2 import Environment, PackageLoader, StrictUndefined, Template, UndefinedError

from .. import __version__
from ..arch.spec import LAYER, MODEL
from ..config.fields import to_yaml
from ..domains.manifest import CALIBRATED
from ..errors import StructPruneError, one_line
from ..plain_json import replace_text
from ..record.answers import outcome, remark, telling
from ..record.details import Choice
from ..record.facts import UNKNOWN, Facts, Row, cells, facts_of, perplexity_facts, quality_rows, remarks, size_rows
from ..record.records import Records
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


def page(records: Records) -> str:
    """The page of one result: HTML that needs nothing else. Its sentences are in the template."""
    details, config = records.details, records.config
    try:
        return _template().render(
            records=records,
            tiles=list(_tiles(records)),
            broken=_broken(records),
            sizes=_sizes(records),
            gone=_gone_layers(records),
            qualities=list(_qualities(records)),
            widths=list(_width_charts(records)),
            errors={kind: _error_chart(kind, choices) for kind, choices in sorted(details.choices.items())},
            agreements=list(_agreements(records)),
            losses=list(_loss_charts(records)),
            answers=telling(records.answers),
            answers_line=remark(records.answers) if records.answers else "",
            remarks=list(remarks(records.report)),
            spent=_spent(records),
            commands=_commands(records),
            config_yaml=to_yaml(dict(config)) if config else "",
            training_yaml=to_yaml(dict(records.training)) if records.training else "",
            manifest=_manifest(records),
            version=__version__,
        )
    except (LookupError, TypeError, ValueError, AttributeError, UndefinedError) as error:
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
    environment.filters |= {"time": readable_time, "count": _count, "outcome": outcome}
    return environment.get_template("page.html.jinja")


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
    if spent := records.spent:
        note = "since it went on" if details.resumed else "in all stages"
        yield "Time", readable_time(sum(spent.values())), note


def _run(records: Records) -> dict[str, Facts]:
    facts = facts_of(records.report)
    return {"dense": facts["before"], "pruned": facts["after"]}


def _training(records: Records) -> dict[str, Facts]:
    return perplexity_facts(records.recovery)


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


def _sizes(records: Records) -> Table:
    models = _run(records)
    for facts, when in zip(models.values(), ("before", "after"), strict=True):
        facts.weights = records.details.model.get("bytes", {}).get(when)
    return _facts_table("Size", models, size_rows([*models.values()]))


def _gone_layers(records: Records) -> list[int]:
    kept = {} if records.plan is None else records.plan.keep
    layers = range(records.report["dense_widths"].get(LAYER, 0))
    return [layer for layer in layers if layer not in kept.get((MODEL, LAYER), layers)]


def _qualities(records: Records) -> Iterator[Table]:
    """Perplexity by domain and scores of tasks, dense, pruned and recovered: held-out and other text apart."""
    models = {"Held-out text of the calibration": _run(records), "Held-out text of the recovery": _training(records)}
    last = "recovered" if records.recovery else "pruned"
    perplexities, shared = records.evaluation.get("perplexity", {}), records.evaluation.get("shared")
    for title, names in _by_kinship(list(perplexities), shared).items():
        of_kind = {name: perplexities[name] for name in names}
        tokens = records.evaluation.get("tokens", {})
        measured = perplexity_facts({**records.evaluation, "perplexity": of_kind, "perplexity_tokens": tokens})
        models[title] = {last if name == "model" else name: facts for name, facts in measured.items()}
    tasks = records.evaluation.get("tasks", {})
    models["Tasks"] = {
        label: Facts(tasks={task: scores.get(name, {}) for task, scores in tasks.items()})
        for label, name in (("dense", "dense"), (last, "model"))
        if any(name in scores for scores in tasks.values())
    }
    for caption, facts_by_model in models.items():
        if rows := quality_rows([*facts_by_model.values()]):
            ratios = [row.ratio or 0.0 for row in rows]
            bars = [ratio / max(ratios) for ratio in ratios] if any(ratios) else []
            yield _facts_table(caption, facts_by_model, rows, bars)


def _by_kinship(names: Sequence[str], shared: Sequence[str] | None) -> dict[str, list[str]]:
    """The domains of an evaluation by what they have to do with the calibration, under the heading of each kind."""
    if shared is None:
        return {"Evaluated text; whether it was calibrated on is not known": list(names)}
    return {
        "Unseen text": [name for name in names if name not in shared],
        "Text that the calibration or the training shares": [name for name in names if name in shared],
    }


def _width_charts(records: Records) -> Iterator[Chart]:
    """How many units each layer keeps, by kind of space."""
    for kind, by_layer in sorted(records.report["widths"].items()):
        if list(by_layer) == [str(MODEL)]:
            continue  # the first section has what belongs to the whole model
        full = records.report["dense_widths"][kind]
        rows = [[layer, f"{width:,}", _change(width / full)] for layer, width in by_layer.items()]
        series = {"removed": [1.0] * len(rows), "kept": [width / full for width in by_layer.values()]}
        table = Table(f"{kind} by layer", ["layer", "kept", "change"], rows)
        yield Chart(f"{kind}: the units that each layer keeps", series, f"{full:,} units", table)


def _error_chart(kind: str, choices: Mapping[int, Choice]) -> Chart | None:
    """The errors that pruning left in each layer; None where no Gram matrix was gathered."""
    errors = {layer: choice.error for layer, choice in choices.items() if any(choice.error)}
    if not errors:
        return None
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


def _agreements(records: Records) -> Iterator[Table]:
    """Pairs of domains by kind of space, those first that agree least."""
    for kind, choices in sorted(records.details.choices.items()):
        by_layer = {layer: choice.agreement for layer, choice in choices.items() if choice.agreement}
        if not by_layer:
            continue
        pairs = []
        for place, (a, b) in enumerate(combinations(records.details.domains, 2)):
            layer = min(by_layer, key=lambda layer: by_layer[layer][place])
            mean = fmean(agreement[place] for agreement in by_layer.values())
            pairs.append((mean, f"{a} – {b}", by_layer[layer][place], layer))
        rows = [[pair, f"{mean:.2f}", f"{lowest:.2f}", str(layer)] for mean, pair, lowest, layer in sorted(pairs)]
        bars = [max(mean, 0.0) for mean, *_ in sorted(pairs)]
        yield Table(f"{kind}: agreement of domains", ["domains", "mean", "least", "in layer"], rows, bars)


def _loss_charts(records: Records) -> Iterator[Chart]:
    """The loss of the model with some units of one layer gone, one series for each number of them."""
    for kind, by_layer in sorted(records.details.sensitivity.items()):
        # By layer and number of units, where the losses of all domains are finite; others are None.
        losses = {
            layer: {
                units: [loss for loss in domains if loss is not None]
                for units, domains in by_units.items()
                if domains and None not in domains
            }
            for layer, by_units in by_layer.items()
        }
        means = {layer: {units: fmean(of) for units, of in by_units.items()} for layer, by_units in losses.items()}
        if not any(means.values()):
            continue
        counts = sorted({units for by_units in means.values() for units in by_units}, reverse=True)
        top = max(mean for by_units in means.values() for mean in by_units.values()) or 1.0
        series = {
            f"{units:,} removed": [max(by_units.get(units, 0.0), 0.0) / top for by_units in means.values()]
            for units in counts[:: -(-len(counts) // MOST_SERIES)]
        }
        rows = [
            [str(layer), f"{units:,}", f"{means[layer][units]:.4f}", f"{max(of):.4f}"]
            for layer, by_units in losses.items()
            for units, of in by_units.items()
        ]
        table = Table(f"{kind}, nats per token", ["layer", "removed", "mean", "worst domain"], rows)
        caption = f"{kind}: loss of the model with units of one layer gone"
        yield Chart(caption, series, f"{top:.4f} nats per token", table)


def _spent(records: Records) -> Table | None:
    """Time and memory by stage; None where no stage was timed."""
    spent, peaks = records.spent, records.details.memory
    if not spent:
        return None
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
    return Table("Time and memory by stage", head, rows, [seconds / top for seconds in spent.values()])


def _commands(records: Records) -> list[str]:
    """The commands that repeat the run; the pruning is not among them where its text cannot be read again."""
    dense, output = records.dense or "DENSE", records.output
    commands = [
        ["evaluate", output, "--against", dense, "--domain", "NAME=SOURCE"],
        ["report", output, dense],
    ]
    made = records.commands(output, dense, f"{output}-again")
    return [*made, *(join(["structprune", *command]) for command in commands)]


def _manifest(records: Records) -> Table | None:
    rows = [
        [
            f"{entry['name']}: {entry['origin'].get('source', 'given inputs')}",
            entry.get("use", CALIBRATED),
            f"{entry['weight']:.3f}",
            *(f"{entry[name]:,}" for name in ("calibration_tokens", "heldout_tokens")),
            f"{len(entry['documents']):,}",
            entry["samples_sha256"][:12],
        ]
        for entry in records.manifest.get("domains", [])
    ]
    head = ["domain", "use", "weight", "tokens", "held out", "documents", "SHA-256"]
    return Table("Manifest: what was calibrated and trained on", head, rows) if rows else None


def _facts_table(caption: str, models: Mapping[str, Facts], rows: Sequence[Row], bars: Sequence[float] = ()) -> Table:
    """Rows about models as a table; bars are as long as the ratios, the longest over the whole width."""
    head, *lines = cells(list(models), rows)
    return Table(caption, head, lines, bars)


def _change(ratio: float, digits: int = 1) -> str:
    return f"{ratio - 1:+.{digits}%}".replace("-", "−")


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
