"""The records of a result, what its card and its page say of them, and the page itself; see `result.jinja`."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from shlex import join, quote
from textwrap import shorten
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, UndefinedError
from markupsafe import Markup

from .. import __version__
from ..config.domains import IN_MEMORY, DomainConfig
from ..config.fields import changed, read_json, to_yaml
from ..config.pruning import CONFIG_NAME, StructPruneConfig
from ..config.recovery import RATES, RecoveryConfig
from ..domains.manifest import CALIBRATED, JUDGED, MANIFEST_NAME, TRAINED
from ..domains.sources import READERS
from ..errors import StructPruneError
from ..record.answers import Items, outcome, remark, sample_items
from ..record.remarks import remarks, removal_phrases, speed_remark, verdict
from ..record.report import RECOVERY_CONFIG_NAME, RECOVERY_REPORT_NAME, REPORT_NAME
from ..record.table import Row, cells, escaped, markdown, models_of, quality_rows, size_rows, speed_rows
from ..system.processes import is_first_rank
from ..written import check_unchanged, replace_text, warn_on_error


EVALUATION_NAME, SPEED_NAME, PAGE_NAME = "evaluation.json", "speed.json", "report.html"
ID = re.compile(r"[\w.-]+/[\w.-]+")  # a name on the Hub
HUB_CACHE = re.compile(r"models--(.+?)--([^/]+)/snapshots")
PLACES = ("losses_dir", "checkpoint_dir", "arch_file", "keep_tokens")
MOST_SHOWN = 200  # characters of a question or an answer


@dataclass(frozen=True)
class Records:
    """The records of a result, each empty where there is none: `report` has the numbers of the run, with those of a
    training as `recovery`, `domains` the text, `training` the config of one that is no part of the pruning's,
    `evaluation` and `speed` what was measured later; `dense` is the name of the dense model.
    """

    report: Mapping[str, Any]
    config: Mapping[str, Any]
    domains: Sequence[Mapping[str, Any]]
    training: Mapping[str, Any]
    evaluation: Mapping[str, Any]
    speed: Mapping[str, Any]
    dense: str

    @classmethod
    def read(cls, folder: str | Path, dense: str = "") -> Records:
        """The records in a folder."""

        def read(name: str) -> dict[str, Any]:
            return {**read_json(path)} if (path := Path(folder, name)).is_file() else {}

        report = read(REPORT_NAME)
        report["recovery"] = read(RECOVERY_REPORT_NAME) or report.get("recovery") or {}
        return cls(
            report=report,
            config=read(CONFIG_NAME),
            domains=read(MANIFEST_NAME).get("domains") or (),
            training=read(RECOVERY_CONFIG_NAME),
            evaluation=read(EVALUATION_NAME),
            speed=read(SPEED_NAME),
            dense=dense or (report.get("model") or {}).get("name", ""),
        )

    def commands(self, folder: str, dense: str, again: str) -> list[str]:
        """The commands that make the model again from the configs in a folder; none where a program gave text."""
        configs = (self.config, self.training)
        sources = [str(domain.get("source", "")) for of in configs for domain in of.get("domains") or ()]
        named = all(entry.get("origin") for entry in self.domains if entry.get("use") != JUDGED)
        if not self.config or not named or any(source.startswith(IN_MEMORY) for source in sources):
            return []
        dtype = ["--dtype", of] if (of := (self.report.get("model") or {}).get("dtype")) else []
        lines = [["prune", dense, again, "--config", f"{folder}/{CONFIG_NAME}", *dtype]]
        if self.training:
            lines.append(["recover", again, again, "--overwrite", "--config", f"{folder}/{RECOVERY_CONFIG_NAME}"])
            recovery = self.report["recovery"]
            taught = any("dense" in perplexity for perplexity in (recovery.get("perplexity") or {}).values())
            teacher = recovery.get("teacher") or self.dense
            lines[1] += ["--teacher", dense if teacher == self.dense else teacher] if taught else []
            lines[1] += ["--arch", self.config["arch_file"]] if self.config.get("arch_file") else []
        return [join(["structprune", *line]) for line in lines]

    @property
    def configs(self) -> dict[str, str]:
        """What differs from the defaults in the configs of the pruning and of the training, as YAML by file name."""
        pruning, training = _changed(StructPruneConfig, self.config), _changed(RecoveryConfig, self.training)
        of_each = {CONFIG_NAME: pruning, RECOVERY_CONFIG_NAME: training}
        return {name: to_yaml(values).strip() for name, values in of_each.items() if values}

    @property
    def heldout_is_disjoint(self) -> bool:
        """Whether no document that was held out has had another use, as far as the manifest knows documents."""
        held, *used = (
            {document for entry in self.domains for document in entry.get(name, ())}
            for name in ("heldout_documents", "documents", "probe_documents")
        )
        return not held & set().union(*used)


def _environment(form: str, **more: Any) -> Environment:
    """Templates in which what they are handed is nothing but text."""
    loader = PackageLoader("optimum_structprune.saving", ".")
    layout: dict[str, Any] = {"trim_blocks": True, "lstrip_blocks": True, "undefined": StrictUndefined}
    environment = Environment(loader=loader, autoescape=True, **layout, **more)
    environment.globals["form"] = form
    environment.filters["markdown"] = lambda table: Markup(markdown(table))
    return environment


HTML = _environment("html.jinja")
MARKDOWN = _environment(
    "markdown.jinja", finalize=lambda value: value if hasattr(value, "__html__") else Markup(escaped(str(value)))
)


def shown_of(records: Records, dense: str, dense_path: str, folder: str, again: str) -> dict[str, Any]:
    """The values of `result.jinja`; `dense_path`, `folder` and `again` stand in its commands."""
    report, recovery, evaluation = records.report, records.report["recovery"], records.evaluation
    sizes, measured = size_rows(report), {"Held out of the calibration": report, "Held out of the training": recovery}
    measured |= {"Measured later": evaluation, "Speed": records.speed}
    rows = {name: [*quality_rows(of), *speed_rows(of)] for name, of in measured.items()}
    uses = "some of its documents were used for the pruning too"
    uses = "none of its documents was used for anything else" if records.heldout_is_disjoint else uses
    notes = [*remarks(report), *map("warning: {}".format, evaluation.get("warnings") or ())]
    notes += [speed_remark(records.speed)] if records.speed.get("run_memory") else []
    notes += [f"held-out text: {uses}"] if report.get("perplexity") else []
    answers: Items = next(filter(None, (record.get("answers") for record in (evaluation, recovery, report))), [])
    training = records.training or records.config.get("recovery") or {}
    seconds = {**(report.get("seconds") or {}), **({"recovery": recovery["seconds"]} if records.training else {})}
    measure = f"structprune evaluate {quote(folder)} --against {quote(dense_path)} --domain NAME=SOURCE --html"
    measure += " --speed" * (not report.get("embeddings"))
    return {
        "dense": dense,
        "removed": list(removal_phrases(report)),
        "counts": report.get("parameters"),
        "verdict": list(map(sentence, verdict(report))) if report.get("parameters") else [],
        "sizes": _table(report, sizes, recovery) if sizes else [],
        "tables": {name: _table(measured[name], of, recovery) for name, of in rows.items() if of},
        "notes": [sentence(note) for note in notes if note],
        "answered": list(map(sentence, remark(answers))) if answers else [],
        "answers": list(map(_written, sample_items(answers))) if answers else [],
        "calibrated_on": _domains(records, CALIBRATED),
        "trained": recovery,
        "trained_on": _domains(records, TRAINED),
        "learning_rate": (training.get("training") or {}).get("learning_rate") or RATES.get(training.get("train", "")),
        "version": __version__,
        "spent": timedelta(seconds=round(sum(seconds.values()))) if seconds else "",
        "resumed": report.get("resumed"),
        "configs": records.configs,
        "commands": [*records.commands(folder, dense_path, again), measure] if report.get("parameters") else [],
    }


def sentence(words: str) -> str:
    """A remark as a sentence."""
    return f"{words[:1].upper()}{words[1:].rstrip('.')}."


def _table(record: Mapping[str, Any], rows: list[Row], recovery: Mapping[str, Any]) -> list[list[str]]:
    names = {"before": "dense", "after": "pruned", "model": "recovered" if recovery else "pruned"}
    return cells([names.get(model, model) for model in models_of(record)], rows)


def _written(item: Mapping[str, Any]) -> tuple[str, list[str]]:
    """A question, and what each model wrote; words of others never begin a line, where Markdown might read them."""
    written = [f"{outcome(of)} ({name}): {shorten(of['text'], MOST_SHOWN)}" for name, of in item["answers"].items()]
    return shorten(item["prompt"], MOST_SHOWN), written


def _domains(records: Records, use: str) -> list[list[str]]:
    """The domains of the manifest that were used for one thing, as a table."""
    rows = [["domain", "source", "share", "tokens"]]
    for entry in records.domains:
        if entry.get("use", CALIBRATED) == use:
            origin = entry["origin"]
            source = short_name(" ".join(str(origin[key]) for key in ("source", "dataset_config") if origin.get(key)))
            share, tokens = f"{entry['weight']:.2f}", f"{entry['calibration_tokens']:,}"
            rows.append([entry["name"], source or "given inputs", share, tokens])
    return rows if len(rows) > 1 else []


def short_name(source: str) -> str:
    """A model or text as people know it: an id on the Hub, or the name of a folder or file without where it lies."""
    if cached := HUB_CACHE.search(source):
        return "/".join(cached.groups())
    path = Path(source)
    local = path.is_absolute() or path.exists() or path.suffix in READERS
    return path.resolve().name if source and local else source


def _changed(config: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values that differ from the defaults of a config and of those inside it, with names in place of paths."""
    shown = changed(config, values)
    for name in PLACES:
        if (value := shown.get(name)) and (name != "keep_tokens" or os.path.isfile(os.path.expanduser(value))):
            shown[name] = short_name(str(value))
    if domains := shown.get("domains"):
        shown["domains"] = [{**changed(DomainConfig, of), "source": short_name(of["source"])} for of in domains]
    if recovery := shown.get("recovery"):
        shown["recovery"] = _changed(RecoveryConfig, recovery)
    return shown


def check_result(folder: str | Path) -> None:
    """Refuse a folder that is not what a pruning has saved."""
    if not Path(folder, REPORT_NAME).is_file():
        raise StructPruneError(
            f"{folder} has no {REPORT_NAME}, so it is not what `structprune prune` or `pruner.save` wrote; name "
            "such a folder."
        )


def page(folder: str | Path, dense: str = "") -> str:
    """The page of one result: HTML that needs nothing else."""
    check_result(folder)
    records = Records.read(folder, dense)
    try:
        named = (records.report.get("model") or {}).get("base_model") or short_name(records.dense)
        dense = named if ID.fullmatch(named) else records.dense or "DENSE"
        shown = shown_of(records, named, dense, str(folder), f"{folder}-again")
        return HTML.get_template("page.html.jinja").render(**shown, title=Path(folder).absolute().name)
    except (LookupError, TypeError, ValueError, AttributeError, UndefinedError) as error:
        raise StructPruneError(f"{folder}: a record is not what this package writes: {error!r}.") from error


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
    replace_text(path, page(folder, dense))
    return path


def write_page_or_warn(output: str | Path) -> None:
    """Write the page of a result that was saved; one that cannot be made only gives a warning."""
    if is_first_rank() and Path(output, REPORT_NAME).is_file():
        with warn_on_error(output, PAGE_NAME):
            write_report(output)
