"""Reads the records that are saved with a model: how it was pruned, on what, and what was measured."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config.fields import read_mapping
from ..config.pruning import CONFIG_NAME
from ..domains.manifest import MANIFEST_NAME
from ..errors import StructPruneError
from ..surgery.plan import PLAN_NAME, Plan
from .details import DETAILS_NAME, Details
from .report import RECOVERY_REPORT_NAME, REPORT_NAME


EVALUATION_NAME = "evaluation.json"


@dataclass(frozen=True)
class Records:
    """The records of the result in the folder `output`, each empty where the folder does not have it. `recovery` holds
    the numbers of the training, `evaluation` what `structprune evaluate` measured, `dense` the dense model's name.
    """

    output: str
    report: Mapping[str, Any]
    details: Details = field(default_factory=Details)
    config: Mapping[str, Any] = field(default_factory=dict)
    plan: Plan | None = None
    manifest: Mapping[str, Any] = field(default_factory=dict)
    recovery: Mapping[str, Any] = field(default_factory=dict)
    evaluation: Mapping[str, Any] = field(default_factory=dict)
    dense: str = ""

    @classmethod
    def read(cls, folder: str | Path, output: str | Path | None = None, dense: str = "") -> Records:
        """The records in a folder."""
        folder = Path(folder)
        if not (folder / REPORT_NAME).is_file():
            raise StructPruneError(
                f"{folder} has no {REPORT_NAME}, so it is not what `structprune prune` or `pruner.save` wrote; name "
                "such a folder."
            )

        def read(name: str) -> Mapping[str, Any]:
            return read_mapping(folder / name, json.loads) if (folder / name).is_file() else {}

        report = read(REPORT_NAME)
        details = Details.load(folder / DETAILS_NAME) if (folder / DETAILS_NAME).is_file() else Details()
        return cls(
            output=str(output or folder),
            report=report,
            details=details,
            config=read(CONFIG_NAME),
            plan=Plan.load(folder / PLAN_NAME) if (folder / PLAN_NAME).is_file() else None,
            manifest=read(MANIFEST_NAME),
            recovery=read(RECOVERY_REPORT_NAME) or report.get("recovery") or {},
            evaluation=read(EVALUATION_NAME),
            dense=dense or str(details.model.get("name", "")),
        )
