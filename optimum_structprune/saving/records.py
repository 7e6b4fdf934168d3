"""Read the records in the folder of a result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config.fields import read_json
from ..config.pruning import CONFIG_NAME
from ..domains.manifest import MANIFEST_NAME, Entry, Manifest
from ..record.report import (
    EVALUATION_NAME,
    RECOVERY_CONFIG_NAME,
    RECOVERY_REPORT_NAME,
    REPORT_NAME,
    SPEED_NAME,
    Evaluation,
    RecoveryReport,
    Report,
    Speed,
)


@dataclass(frozen=True)
class Records:
    """The records of a result.

    Attributes:
        report: The report of the pruning, with the training after it; without sizes where there is none.
        config: The config of the pruning; empty where there is none.
        domains: The text that the model has seen.
        training: The config of a training that was a run of its own; empty where there is none.
        evaluation: The evaluation that `structprune evaluate` added; None where there is none.
        speed: The speed that `structprune evaluate` measured; None where it was not measured.
        original: The id or the folder of the original model; empty where it is unknown.
    """

    report: Report
    config: Mapping[str, Any]
    domains: Sequence[Entry]
    training: Mapping[str, Any]
    evaluation: Evaluation | None
    speed: Speed | None
    original: str

    @classmethod
    def read(cls, folder: str | Path, original: str = "") -> Records:
        """Read the records in a folder.

        Args:
            folder: The folder of a result.
            original: The original model; by default the one in the report.

        Raises:
            StructPruneError: If a record cannot be read.
        """
        folder = Path(folder)
        report = Report.load(folder / REPORT_NAME) or Report(model_type="", criterion="")
        report.recovery = RecoveryReport.load(folder / RECOVERY_REPORT_NAME) or report.recovery
        domains: Sequence[Entry] = []
        if (folder / MANIFEST_NAME).is_file():
            domains = Manifest.load(folder).domains

        return cls(
            report=report,
            config=_read_config(folder / CONFIG_NAME),
            domains=domains,
            training=_read_config(folder / RECOVERY_CONFIG_NAME),
            evaluation=Evaluation.load(folder / EVALUATION_NAME),
            speed=Speed.load(folder / SPEED_NAME),
            original=original or report.model.name,
        )

    def with_use(self, use: str) -> list[Entry]:
        """Return the text that was used in one way."""
        return [entry for entry in self.domains if entry.use == use]


def _read_config(path: Path) -> Mapping[str, Any]:
    """Return the fields of a config, or none if there is no file."""
    if not path.is_file():
        return {}
    return read_json(path)
