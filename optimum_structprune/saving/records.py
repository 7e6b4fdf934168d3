"""Reads the records in the folder of a result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import join
from typing import Any

from ..config.domains import IN_MEMORY
from ..config.fields import read_json
from ..config.pruning import CONFIG_NAME
from ..domains.manifest import EARLIER, JUDGED, MANIFEST_NAME, Entry, Manifest
from ..record.evaluation import Evaluation
from ..record.report import RECOVERY_CONFIG_NAME, RECOVERY_REPORT_NAME, REPORT_NAME, RecoveryReport, Report
from ..record.speed import Speed
from .names import EVALUATION_NAME, SPEED_NAME


@dataclass(frozen=True)
class Records:
    """The records of a result.

    Attributes:
        report: The report of the pruning, with the training after it; without sizes where there is none.
        config: The config of the pruning; empty where there is none.
        domains: The text that the model has seen.
        training: The config of a training that is not part of the config of the pruning; empty where there is none.
        evaluation: What was measured later; None where nothing was.
        speed: How fast the model is; None where it was not measured.
        dense: The id or the folder of the original model; empty where it is unknown.
    """

    report: Report
    config: Mapping[str, Any]
    domains: Sequence[Entry]
    training: Mapping[str, Any]
    evaluation: Evaluation | None
    speed: Speed | None
    dense: str

    @classmethod
    def read(cls, folder: str | Path, dense: str = "") -> Records:
        """Read the records in a folder. Reports of earlier versions count as missing.

        Args:
            folder: The folder of a result.
            dense: The original model; by default the one in the report.

        Raises:
            StructPruneError: If a record cannot be read.
        """
        folder = Path(folder)
        report = Report.load(folder / REPORT_NAME) or Report("", "")
        report.recovery = RecoveryReport.load(folder / RECOVERY_REPORT_NAME) or report.recovery
        has_manifest = (folder / MANIFEST_NAME).is_file()
        return cls(
            report=report,
            config=_read_config(folder / CONFIG_NAME),
            domains=Manifest.load(folder).domains if has_manifest else [],
            training=_read_config(folder / RECOVERY_CONFIG_NAME),
            evaluation=Evaluation.load(folder / EVALUATION_NAME),
            speed=Speed.load(folder / SPEED_NAME),
            dense=dense or report.model.name,
        )

    def of_use(self, use: str) -> list[Entry]:
        """Return the text that was used in one way."""
        return [entry for entry in self.domains if entry.use == use]

    def commands(self, folder: str, dense: str, output: str) -> list[str]:
        """Return the commands that repeat the run from the configs in a folder.

        There are none if a program gave the text, or if several trainings followed, because the folder has the config
        of the last one only.

        Args:
            folder: The folder with the configs.
            dense: The original model.
            output: The folder for the repeated result.
        """
        if not self.config or not self.report.dense.parameters or self._has_unnamed_text():
            return []
        recovery = self.report.recovery
        if recovery is not None and recovery.earlier:
            return []

        prune = ["prune", dense, output, "--config", f"{folder}/{CONFIG_NAME}"]
        if self.report.model.dtype:
            prune += ["--dtype", self.report.model.dtype]
        commands = [prune]
        if self.training and recovery is not None:
            recover = ["recover", output, output, "--overwrite", "--config", f"{folder}/{RECOVERY_CONFIG_NAME}"]
            if recovery.has_dense:
                is_same = recovery.teacher in ("", self.dense)
                recover += ["--teacher", dense if is_same else recovery.teacher]
            if self.config.get("arch_file"):
                recover += ["--arch", self.config["arch_file"]]
            commands.append(recover)
        return [join(["structprune", *command]) for command in commands]

    def _has_unnamed_text(self) -> bool:
        """Return whether a program gave text that has no name."""
        if any(not entry.origin for entry in self.domains if entry.use not in (JUDGED, EARLIER)):
            return True
        named = [*(self.config.get("domains") or ()), *(self.training.get("domains") or ())]
        return any(str(domain.get("source", "")).startswith(IN_MEMORY) for domain in named)


def _read_config(path: Path) -> Mapping[str, Any]:
    """Return the fields of a config, or none if there is no file."""
    return read_json(path) if path.is_file() else {}
