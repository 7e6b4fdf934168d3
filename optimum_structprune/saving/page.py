"""Makes the page about a result from its records, and writes it beside the model."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from shlex import join
from statistics import geometric_mean

from jinja2 import Environment, PackageLoader, StrictUndefined, Template, UndefinedError

from .. import __version__
from ..arch.spec import LAYER, MODEL
from ..errors import StructPruneError
from ..method.shrink import Keep
from ..record.answers import outcome, remark
from ..record.facts import (
    NAMES,
    Table,
    cells,
    other_text,
    perplexity_facts,
    quality_of_run,
    quality_rows,
    quality_tables,
    remarks,
    removed,
    size_rows,
)
from ..record.plan import PLAN_NAME, Plan
from ..record.records import Records, short_name
from ..record.report import REPORT_NAME
from ..record.text import plus_minus, readable_time, sample_items
from ..record.verdict import verdict
from ..system.processes import is_first_rank
from ..system.stages import readable_size
from ..written import check_unchanged, replace_text, warn_on_error


PAGE_NAME = "report.html"
ID = re.compile(r"[\w.-]+/[\w.-]+")  # a name on the Hub


def page(records: Records) -> str:
    """The page of one result: HTML that needs nothing else. Its sentences are in the template."""
    output, plan = records.output, Path(records.output, PLAN_NAME)
    kept = Plan.load(plan).keep if plan.is_file() else {}
    named = records.details.model.get("base_model") or short_name(records.dense)
    dense = named if ID.fullmatch(named) else records.dense or "DENSE"
    measure = ["evaluate", output, "--against", dense, "--domain", "NAME=SOURCE", "--speed", "--html"]
    try:
        return _template().render(
            records=records,
            name=Path(records.output).absolute().name,
            dense=named,
            verdict=verdict(records.report),
            tiles=list(_tiles(records)),
            broken=_broken(records),
            removed=list(removed(records.report)),
            sizes=_sizes(records),
            gone=_gone_layers(records, kept),
            qualities=list(quality_tables(records)),
            widths=list(_widths(records)),
            answers=sample_items(records.answers),
            answers_lines=remark(records.answers),
            remarks=list(remarks(records.report)),
            commands=[*records.commands(output, dense, f"{output}-again"), join(["structprune", *measure])],
            configs=records.configs,
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


def write_report(folder: str | Path, dense: str = "") -> Path:
    """Write the page of a result into its folder, in one step.

    Args:
        folder: The folder of a pruned model.
        dense: The name of the dense model; by default what the run has noted.

    Returns:
        The path of the page.

    Raises:
        StructPruneError: If the folder has no report, a record cannot be read, or the page that is there is another
            program's or has been changed.
    """
    path = Path(folder, PAGE_NAME)
    check_unchanged(path)
    replace_text(path, page(Records.read(folder, dense)))
    return path


def write_page_or_warn(output: str | Path) -> None:
    """Write the page of a result that was saved; one that cannot be made only gives a warning."""
    if is_first_rank() and Path(output, REPORT_NAME).is_file():
        with warn_on_error(output, PAGE_NAME):
            write_report(output)


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
    other = other_text(records)
    of_run = {"Perplexity": quality_of_run(records), "Perplexity, recovered": perplexity_facts(records.recovery)}
    for label, models in ({"Perplexity, other text": other} if other else of_run).items():
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


def _broken(records: Records) -> list[str]:
    """The domains with a perplexity that is no finite number, which JSON has as null."""
    measured = [*(records.report.get("perplexity") or {}).items(), *(records.recovery.get("perplexity") or {}).items()]
    return sorted({name for name, by_model in measured if None in by_model.values()})


def _sizes(records: Records) -> Table:
    models = quality_of_run(records)
    for facts, when in zip(models.values(), ("before", "after"), strict=True):
        facts.weights = records.details.model.get("bytes", {}).get(when)
    head, *lines = cells(list(models), size_rows([*models.values()]))
    return Table("Size", head, lines)


def _gone_layers(records: Records, kept: Keep) -> list[int]:
    layers = range(records.report["dense_widths"].get(LAYER, 0))
    return [layer for layer in layers if layer not in kept.get((MODEL, LAYER), layers)]


def _widths(records: Records) -> Iterator[Table]:
    """How much each layer keeps, by kind of space, where the layers differ; bars are as long as what is gone."""
    for kind, by_layer in sorted(records.report["widths"].items()):
        if len({*by_layer.values()}) > 1:
            shares = [width / records.report["dense_widths"][kind] for width in by_layer.values()]
            rows = [
                [layer, f"{width:,}", f"{share - 1:+.1%}".replace("-", "−")]
                for (layer, width), share in zip(by_layer.items(), shares, strict=True)
            ]
            gone = [1 - share for share in shares]
            yield Table(f"{NAMES.get(kind, kind)} of each layer", ["layer", "kept", "change"], rows, gone)


def _millions(number: int) -> str:
    return f"{number / 1e6:,.1f} million" if number >= 1e6 else f"{number:,}"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
