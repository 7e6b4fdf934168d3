"""What lies beside a model and says how it came about."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config.fields import read_mapping
from ..config.pruning import CONFIG_NAME
from ..domains.manifest import MANIFEST_NAME
from ..errors import StructPruneError, one_line
from ..surgery.plan import PLAN_NAME, Plan
from .details import DETAILS_NAME, Details
from .report import RECOVERY_REPORT_NAME, REPORT_NAME


EVALUATION_NAME = "evaluation.json"


@dataclass(frozen=True)
class Records:
    """The records of one result; a record is None where the folder does not have it.

    Attributes:
        output: The folder's name, as it is shown.
        report: The numbers of the run.
        details: What the run saw while it pruned.
        config: How it pruned.
        plan: The units of the dense model that are kept.
        manifest: What it was calibrated on.
        recovery: The numbers of the training afterwards.
        evaluation: What `structprune evaluate` has measured.
        dense: The name of the dense model; empty where it is not known.
        dense_bytes: The size of its weights, where that is known.
    """

    output: str
    report: Mapping[str, Any]
    details: Details | None = None
    config: Mapping[str, Any] | None = None
    plan: Plan | None = None
    manifest: Mapping[str, Any] | None = None
    recovery: Mapping[str, Any] | None = None
    evaluation: Mapping[str, Any] | None = None
    dense: str = ""
    dense_bytes: int = 0

    @classmethod
    def read(
        cls, folder: str | Path, output: str | Path | None = None, dense: str = "", dense_bytes: int = 0
    ) -> Records:
        """The records in a folder."""
        folder = Path(folder)
        if not (folder / REPORT_NAME).is_file():
            raise StructPruneError(
                f"{folder} has no {REPORT_NAME}, so it is not what `structprune prune` or `pruner.save` wrote; name "
                "such a folder."
            )

        def read(name: str) -> Mapping[str, Any] | None:
            return read_mapping(folder / name, json.loads) if (folder / name).is_file() else None

        report = read(REPORT_NAME)
        assert report is not None
        details = Details.load(folder / DETAILS_NAME) if (folder / DETAILS_NAME).is_file() else None
        noted = {} if details is None else details.model
        return cls(
            output=str(output or folder),
            report=report,
            details=details,
            config=read(CONFIG_NAME),
            plan=Plan.load(folder / PLAN_NAME) if (folder / PLAN_NAME).is_file() else None,
            manifest=read(MANIFEST_NAME),
            recovery=read(RECOVERY_REPORT_NAME) or report.get("recovery"),
            evaluation=read(EVALUATION_NAME),
            dense=dense or str(noted.get("name", "")),
            dense_bytes=dense_bytes or int(noted.get("bytes", {}).get("before", 0)),
        )


@contextmanager
def only_warning(output: str | Path, name: str) -> Iterator[None]:
    """A file beside a result that cannot be made inside `with` only gives a warning."""
    try:
        yield
    except Exception as error:  # hours of work are not given up for a page about them
        warnings.warn(f"{output} gets no {name}: {one_line(error)}", stacklevel=4)
