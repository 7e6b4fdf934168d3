"""Makes the page about a result from its records, and writes it beside the model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from shlex import join
from statistics import geometric_mean

from jinja2 import Environment, PackageLoader, StrictUndefined, Template, UndefinedError

from .. import __version__
from ..arch.spec import LAYER, MODEL
from ..domains.manifest import CALIBRATED
from ..errors import StructPruneError, one_line, warn
from ..record.answers import outcome, remark
from ..record.facts import (
    NAMES,
    UNKNOWN,
    Facts,
    Row,
    cells,
    facts_of,
    perplexity_facts,
    quality_rows,
    remarks,
    removed,
    size_rows,
)
from ..record.records import Records, short_name
from ..record.text import plus_minus, readable_time, sample_items
from ..system.stages import readable_size
from ..written import check_unchanged, replace_text


PAGE_NAME = "report.html"


@dataclass(frozen=True)
class Table:
    """A table of text cells under a head; `bars` are shares from 0 to 1, drawn at the end of each row."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    bars: Sequence[float] = ()


def page(records: Records) -> str:
    """The page of one result: HTML that needs nothing else. Its sentences are in the template."""
    output, dense = records.output, records.dense or "DENSE"
    measure = ["report", output, dense, "--domain", "NAME=SOURCE", "--speed"]
    try:
        return _template().render(
            records=records,
            name=Path(records.output).absolute().name,
            dense=short_name(records.dense),
            tiles=list(_tiles(records)),
            broken=_broken(records),
            removed=list(removed(records.report)),
            sizes=_sizes(records),
            gone=_gone_layers(records),
            qualities=list(quality_tables(records)),
            widths=list(_widths(records)),
            answers=sample_items(records.answers),
            answers_line=remark(records.answers) if records.answers else "",
            remarks=list(remarks(records.report)),
            spent=_spent(records),
            commands=[*records.commands(output, dense, f"{output}-again"), join(["structprune", *measure])],
            configs=records.configs,
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
        StructPruneError: If the folder has no report, a record cannot be read, or the page that is there is another
            program's or has been changed.
    """
    path = Path(folder, PAGE_NAME)
    check_unchanged(path)
    replace_text(path, page(Records.read(folder, output, dense)))
    return path


def write_page_or_warn(folder: str | Path, output: str | Path) -> None:
    """Write the page of a result that is being saved; a page that cannot be made only gives a warning."""
    with warn_on_error(output, PAGE_NAME):
        write_report(folder, output)


@contextmanager
def warn_on_error(output: str | Path, name: str) -> Iterator[None]:
    """A file beside a result that cannot be made inside `with` only gives a warning."""
    try:
        yield
    except Exception as error:  # hours of work are not given up for a page about them
        warn(f"{output} gets no {name}: {one_line(error)}")


def _tiles(records: Records) -> Iterator[tuple[str, str, str]]:
    """The numbers that come first: how much smaller, faster and worse the model is, each with what it comes from."""
    report, sizes = records.report, records.details.model.get("bytes")
    counts = report["parameters"]
    notes = [f"{_millions(counts['before'])} → {_millions(counts['after'])} parameters"]
    notes += [f"{readable_size(sizes['before'])} → {readable_size(sizes['after'])}"] if sizes else []
    yield "Smaller by", f"{1 - counts['after'] / counts['before']:.1%}".replace("%", " %"), "; ".join(notes)
    if speed := records.speedup:
        note = f"in reading a prompt; × {speed['decode']:.2f} in writing. Measured on {speed['where']}"
        yield "Faster", f"× {speed['prefill']:.2f}", note
    if broken := _broken(records):
        yield "Perplexity", "infinite", f"on {', '.join(broken)}"
    for label, models in (("Perplexity", _run(records)), ("Perplexity, recovered", _training(records))):
        rows = [row for row in quality_rows([*models.values()]) if row.label.startswith("perplexity") and row.ratio]
        if "dense" in models and rows:
            worst = max(rows, key=lambda row: row.ratio or 0.0)
            error = plus_minus((worst.errors or (None,))[-1], 2)
            note = f"of the dense model's; most on {worst.label.partition(' ')[2]}: × {worst.ratio:.2f}{error}"
            yield label, f"× {geometric_mean(row.ratio or 1.0 for row in rows):.2f}", note
    if answers := records.answers:
        asked = list(answers[0]["answers"])
        right = [sum(item["answers"][model]["right"] for item in answers) for model in asked]
        yield "Right answers", " → ".join(map(str, right)), f"of {len(answers)} ({' → '.join(asked)})"
    if errors := report.get("output_error"):
        worst_name = max(errors, key=lambda name: errors[name] or 0)
        yield "Output error", f"{errors[worst_name] or 0:.4f}", f"of the hidden states' variance, worst {worst_name}"


def _run(records: Records) -> dict[str, Facts]:
    facts = facts_of(records.report)
    return {"dense": facts["before"], "pruned": facts["after"]}


def _training(records: Records) -> dict[str, Facts]:
    return perplexity_facts(records.recovery)


def _broken(records: Records) -> list[str]:
    """The domains with a perplexity that is no finite number, which JSON has as null."""
    measured = [*(records.report.get("perplexity") or {}).items(), *(records.recovery.get("perplexity") or {}).items()]
    return sorted({name for name, by_model in measured if None in by_model.values()})


def _sizes(records: Records) -> Table:
    models = _run(records)
    for facts, when in zip(models.values(), ("before", "after"), strict=True):
        facts.weights = records.details.model.get("bytes", {}).get(when)
    head, *lines = cells(list(models), size_rows([*models.values()]))
    return Table("Size", head, lines)


def _gone_layers(records: Records) -> list[int]:
    kept = {} if records.plan is None else records.plan.keep
    layers = range(records.report["dense_widths"].get(LAYER, 0))
    return [layer for layer in layers if layer not in kept.get((MODEL, LAYER), layers)]


def quality_tables(records: Records) -> Iterator[Table]:
    """Perplexity by domain and scores of tasks, dense, pruned and recovered: held-out and other text apart."""
    what = "Outputs on the kinds of input" if records.report.get("output_error") else "Perplexity on the kinds of text"
    models = {
        f"{what} that it was calibrated on": _run(records),
        "Perplexity on the kinds of text that it was trained on": _training(records),
    }
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
            yield _quality_table(caption, list(facts_by_model), rows)


def _quality_table(caption: str, models: Sequence[str], rows: Sequence[Row]) -> Table:
    """What was lost first, where it can be said, and what it was measured on last; bars are as long as the losses."""
    columns = {
        "": [row.label.removeprefix("perplexity ").strip() for row in rows],
        "loss": [row.compared() for row in rows],
        **dict(zip(models, zip(*(row.cells() for row in rows), strict=True), strict=True)),
        "tokens": [f"{row.tokens:,}" if row.tokens else "" for row in rows],
    }
    columns = {head: column for head, column in columns.items() if any(column)}
    lost = [max((row.ratio or 1.0) - 1, 0.0) for row in rows]
    bars = [loss / max(lost) for loss in lost] if any(lost) else []
    return Table(caption, [*columns], [*zip(*columns.values(), strict=True)], bars)


def _by_kinship(names: Sequence[str], shared: Sequence[str] | None) -> dict[str, list[str]]:
    """The domains of an evaluation by what they have to do with the calibration, under the heading of each kind."""
    if shared is None:
        return {"Perplexity on other text, which may have been calibrated on": list(names)}
    return {
        "Perplexity on other text": [name for name in names if name not in shared],
        "Perplexity on text that was calibrated or trained on": [name for name in names if name in shared],
    }


def _widths(records: Records) -> Iterator[Table]:
    """How much each layer keeps, by kind of space, where the layers differ; bars are as long as what is gone."""
    for kind, by_layer in sorted(records.report["widths"].items()):
        if len({*by_layer.values()}) > 1:
            shares = [width / records.report["dense_widths"][kind] for width in by_layer.values()]
            rows = [
                [layer, f"{width:,}", _change(share)]
                for (layer, width), share in zip(by_layer.items(), shares, strict=True)
            ]
            gone = [1 - share for share in shares]
            yield Table(f"{NAMES.get(kind, kind)} of each layer", ["layer", "kept", "change"], rows, gone)


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
    head = ["stage", "time", *(f"peak {kind.upper()} memory so far" for kind in kinds)]
    top = max(spent.values()) or 1.0
    return Table("Time and memory by stage", head, rows, [seconds / top for seconds in spent.values()])


def _manifest(records: Records) -> Table | None:
    rows = [
        [
            f"{entry['name']}: {short_name(str(entry['origin'].get('source', 'given inputs')))}",
            entry.get("use", CALIBRATED),
            f"{entry['weight']:.3f}",
            *(f"{entry[name]:,}" for name in ("calibration_tokens", "heldout_tokens")),
            f"{len(entry['documents']):,}",
            entry["samples_sha256"][:12],
        ]
        for entry in records.manifest.get("domains", [])
    ]
    head = ["text", "use", "weight", "tokens", "tokens set aside", "documents", "SHA-256"]
    return Table("Text", head, rows) if rows else None


def _change(ratio: float) -> str:
    return f"{ratio - 1:+.1%}".replace("-", "−")


def _millions(number: int) -> str:
    return f"{number / 1e6:,.1f} million" if number >= 1e6 else f"{number:,}"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
