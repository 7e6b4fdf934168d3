"""The content that the model card and the page of a result share."""

from __future__ import annotations

import re
from datetime import timedelta
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from .. import __version__
from ..config.pruning import CONFIG_NAME
from ..domains.manifest import CALIBRATED, TRAINED
from ..domains.sources import FORMATS
from ..record.answers import outcome, sample_questions
from ..record.comparison import measurement_table, speed_note
from ..record.figures import PRUNED
from ..record.report import RECOVERY_CONFIG_NAME, MeasuredModel, Measurement
from ..record.view import View, request_lines
from ..system.errors import capitalized, one_line
from .records import Records


MAX_ANSWER = 200
# A folder of the Hub's cache, with the owner and the name of a model.
HUB_CACHE = re.compile(r"models--(.+?)--([^/]+)/snapshots")


def templates(**options: Any) -> Environment:
    """Return the environment of the templates of this folder, with filters for sentences and answers."""
    environment = Environment(
        loader=PackageLoader("optimum_structprune.saving", "."),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
        **options,
    )
    environment.filters.update(sentence=sentence, beginning=beginning, outcome=outcome)
    return environment


def content(records: Records, title: str, original: str) -> dict[str, Any]:
    """Return the values of a template about a result. A table is a list of rows; the first row is the head.

    Args:
        records: The records of the result.
        title: The name of the result.
        original: The name of the original model.
    """
    evaluation = records.evaluation
    view = View(records.report, None if evaluation is None else evaluation.answers)
    notes = view.warnings + request_lines(records.report) + view.notes
    notes += view.details
    notes += _overlap(records)

    # The figures that `evaluate` has added to the result.
    models: dict[str, MeasuredModel] = {}
    evaluation_notes = []
    if evaluation is not None:
        models[PRUNED] = MeasuredModel("", evaluation=evaluation)
        evaluation_notes += [f"warning: {warning}" for warning in evaluation.warnings]
    elif records.speed is not None:
        models = {name: MeasuredModel(name) for name in records.speed.models}
    if records.speed is not None:
        evaluation_notes.append(speed_note(records.speed))

    configs = {CONFIG_NAME: records.config, RECOVERY_CONFIG_NAME: records.training}
    return {
        "view": view,
        "title": title,
        "introduction": _introduction(view, original),
        "notes": notes,
        "questions": sample_questions(view.table.answers),
        "evaluation": measurement_table(Measurement(models, records.speed)) if models else [],
        "evaluation_notes": evaluation_notes,
        "calibrated_on": _domain_table(records, CALIBRATED),
        "trained_on": _domain_table(records, TRAINED),
        "duration": _duration(records),
        "configs": [name for name, config in configs.items() if config],
        "version": __version__,
    }


def _introduction(view: View, original: str) -> str:
    """Return a description of the result: `This is NAME, pruned and recovered. …`."""
    report = view.report
    recovery = report.recovery
    steps = "pruned"
    if recovery is not None and recovery.kept_step:
        steps = "pruned and recovered"

    sentences = [f"This is {original or 'a model'}, {steps}."]
    if report.original.parameters:
        sentences.append(
            f"It has {report.removed:.1%} fewer parameters "
            f"({report.original.parameters:,} → {report.pruned.parameters:,})."
        )
    sentences += [sentence(phrase) for phrase in view.widths.values()]
    return " ".join(sentences)


def _overlap(records: Records) -> list[str]:
    """Return whether held-out documents were used for anything else, if perplexity was measured on them."""
    if not records.report.has_perplexity:
        return []

    heldout_documents: set[str] = set()
    other_documents: set[str] = set()

    for entry in records.domains:
        heldout_documents.update(entry.heldout_documents)
        other_documents.update(entry.documents)
        other_documents.update(entry.probe_documents)

    if heldout_documents & other_documents:
        return ["Some held-out documents were used for the pruning too"]
    return ["No held-out document was used for anything else"]


def beginning(text: str) -> str:
    """Return the first 200 characters of a text in one line."""
    line = one_line(text)
    if len(line) > MAX_ANSWER:
        line = f"{line[: MAX_ANSWER - 1]}…"
    return line


def _domain_table(records: Records, use: str) -> list[list[str]]:
    """Return the table of the domains that were used in one way, or nothing if there are none."""
    rows = []
    for entry in records.with_use(use):
        fields = [str(entry.origin[name]) for name in ("source", "dataset_config") if entry.origin.get(name)]
        source = short_name(" ".join(fields)) or "given inputs"
        rows.append([entry.name, source, f"{entry.weight:.2f}", f"{entry.calibration_tokens:,}"])

    if rows:
        rows.insert(0, ["domain", "source", "share", "tokens"])
    return rows


def _duration(records: Records) -> str:
    """Return the duration of the pruning and of the training after it, or nothing if it is unknown."""
    report = records.report
    seconds = sum(report.seconds.values())
    # The duration of a training without a config of its own is part of the stages of the pruning.
    if records.training and report.recovery is not None:
        seconds += report.recovery.seconds

    if not seconds:
        return ""
    return str(timedelta(seconds=round(seconds)))


def sentence(text: str) -> str:
    """Return a remark as a sentence: with a capital letter and a full stop."""
    return f"{capitalized(text).rstrip('.')}."


def short_name(source: str) -> str:
    """Return the usual name of a model or text: its id on the Hub, or the name of its file or folder."""
    match = HUB_CACHE.search(source)
    if match is not None:
        return "/".join(match.groups())
    if not source:
        return ""

    path = Path(source)
    if path.is_absolute() or path.exists() or path.suffix in FORMATS:
        return path.resolve().name
    return source
