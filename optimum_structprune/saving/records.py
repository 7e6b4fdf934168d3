"""Read the records in the folder of a result."""

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
from ..record.report import (
    RECOVERY_CONFIG_NAME,
    RECOVERY_REPORT_NAME,
    REPORT_NAME,
    Evaluation,
    RecoveryReport,
    Report,
    Speed,
    Tasks,
)
from ..system.written import without_folders
from .names import EVALUATION_NAME, SPEED_NAME, TASKS_NAME


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
        tasks: The scores in tasks that `structprune evaluate` measured; None where they were not measured.
        original: The id or the folder of the original model; empty where it is unknown.
    """

    report: Report
    config: Mapping[str, Any]
    domains: Sequence[Entry]
    training: Mapping[str, Any]
    evaluation: Evaluation | None
    speed: Speed | None
    tasks: Tasks | None
    original: str

    @classmethod
    def read(cls, folder: str | Path, original: str = "") -> Records:
        """Read the records in a folder. Reports of earlier versions count as missing.

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
            tasks=Tasks.load(folder / TASKS_NAME),
            original=original or report.model.name,
        )

    def with_use(self, use: str) -> list[Entry]:
        """Return the text that was used in one way."""
        return [entry for entry in self.domains if entry.use == use]

    def commands(self, folder: str, original: str, output: str) -> list[str]:
        """Return the commands that repeat the run from the configs in a folder.

        A run cannot be repeated by commands if a program passed text that has no name, or if the model was trained
        more than once, because the folder has the config of the last training only.

        Args:
            folder: The folder with the configs.
            original: The original model.
            output: The folder for the repeated result.
        """
        if not self.config or not self.report.original.parameters or self._has_unnamed_text():
            return []
        recovery = self.report.recovery
        if recovery is not None and recovery.earlier:
            return []

        if not self.training or recovery is None:
            return [self._prune_command(folder, original, output)]
        pruned = f"{output}-pruned"
        return [
            self._prune_command(folder, original, pruned),
            self._recover_command(recovery, folder, original, pruned, output),
        ]

    def _prune_command(self, folder: str, original: str, output: str) -> str:
        """Return the command that repeats the pruning."""
        command = ["structprune", "prune", original, output, "--config", f"{folder}/{CONFIG_NAME}"]
        dtype = self.report.model.dtype
        if dtype:
            command += ["--dtype", dtype]
        return join(command)

    def _recover_command(self, recovery: RecoveryReport, folder: str, original: str, pruned: str, output: str) -> str:
        """Return the command that repeats the training."""
        config = f"{folder}/{RECOVERY_CONFIG_NAME}"
        command = ["structprune", "recover", pruned, output, "--config", config]

        if recovery.has_original:
            # The card is published, so it names a folder without its path.
            teacher = without_folders(recovery.teacher)
            is_original = teacher in ("", without_folders(self.original))
            command += ["--teacher", original if is_original else teacher]
        if self.config.get("arch_file"):
            command += ["--arch", self.config["arch_file"]]
        return join(command)

    def _has_unnamed_text(self) -> bool:
        """Return whether a program passed text that has no name."""
        for entry in self.domains:
            if not entry.origin and entry.use not in (JUDGED, EARLIER):
                return True

        domains = list(self.config.get("domains") or ())
        domains += self.training.get("domains") or ()
        return any(str(domain.get("source", "")).startswith(IN_MEMORY) for domain in domains)


def _read_config(path: Path) -> Mapping[str, Any]:
    """Return the fields of a config, or none if there is no file."""
    if not path.is_file():
        return {}
    return read_json(path)
