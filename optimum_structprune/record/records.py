"""Reads the records that are saved with a model: how it was pruned, on what, and what was measured."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from shlex import join
from typing import Any

from ..config.domains import IN_MEMORY, DomainConfig
from ..config.fields import changed, read_json, to_yaml
from ..config.pruning import CONFIG_NAME, StructPruneConfig
from ..config.recovery import RecoveryConfig
from ..domains.manifest import CALIBRATED, MANIFEST_NAME
from ..errors import StructPruneError
from .answers import Items
from .report import DETAILS_NAME, RECOVERY_CONFIG_NAME, RECOVERY_REPORT_NAME, REPORT_NAME, Details


EVALUATION_NAME, SPEED_NAME = "evaluation.json", "speed.json"
HUB_CACHE = re.compile(r"models--(.+?)--([^/]+)/snapshots")
TEXT_FILES = (".txt", ".jsonl", ".json", ".parquet", ".csv")
PLACES = ("stats", "losses_dir", "checkpoint_dir", "arch_file", "keep_tokens")


@dataclass(frozen=True)
class Records:
    """The records of the result in the folder `output`, each empty where there is none: `recovery` has the numbers of
    the training, `training` its config if it is no part of the pruning's, `evaluation` and `speed` what was measured
    later.
    """

    output: str
    report: Mapping[str, Any]
    details: Details = field(default_factory=Details)
    config: Mapping[str, Any] = field(default_factory=dict)
    manifest: Mapping[str, Any] = field(default_factory=dict)
    recovery: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    evaluation: Mapping[str, Any] = field(default_factory=dict)
    speed: Mapping[str, Any] = field(default_factory=dict)
    dense: str = ""

    def entries(self, use: str) -> list[Mapping[str, Any]]:
        """The domains of the manifest that were used for one thing."""
        return [entry for entry in self.manifest.get("domains", ()) if entry.get("use", CALIBRATED) == use]

    def commands(self, folder: str, dense: str, again: str) -> list[str]:
        """What makes the model again from the configs in a folder; nothing where a program gave it text."""
        domains = [domain for of in (self.config, self.training) for domain in of.get("domains") or []]
        named = all(entry.get("origin") for entry in self.manifest.get("domains", ()))
        if not self.config or not named or any(str(of.get("source", "")).startswith(IN_MEMORY) for of in domains):
            return []
        dtype = ["--dtype", self.details.model["dtype"]] if self.details.model.get("dtype") else []
        lines = [["prune", dense, again, "--config", f"{folder}/{CONFIG_NAME}", *dtype]]
        if self.training:
            lines.append(["recover", again, again, "--overwrite", "--config", f"{folder}/{RECOVERY_CONFIG_NAME}"])
            taught = any("dense" in perplexity for perplexity in (self.recovery.get("perplexity") or {}).values())
            teacher = self.recovery.get("teacher") or self.dense
            lines[1] += ["--teacher", dense if teacher == self.dense else teacher] if taught else []
            lines[1] += ["--arch", self.config["arch_file"]] if self.config.get("arch_file") else []
        return [join(["structprune", *line]) for line in lines]

    @property
    def configs(self) -> dict[str, str]:
        """What differs from the defaults in the configs of the pruning and of the training, as YAML by file name."""
        of_each = {
            CONFIG_NAME: _changed(StructPruneConfig, self.config),
            RECOVERY_CONFIG_NAME: _changed(RecoveryConfig, self.training),
        }
        return {name: to_yaml(values).strip() for name, values in of_each.items() if values}

    @property
    def speedup(self) -> dict[str, Any]:
        """How many times as fast as the dense model the result reads and writes, and `where`; empty if unknown."""
        for measured in (self.speed.get("measurements") or [])[1:2]:
            shape = f"batch {measured['batch_size']}, a prompt of {measured['prompt']:,} tokens"
            times = {stage: measured[stage]["speedup"]["median"] for stage in ("prefill", "decode")}
            return {**times, "where": f"{self.speed['device']}, threads: {self.speed['threads']}, {shape}"}
        return {}

    @property
    def spent(self) -> dict[str, float]:
        """The seconds of each stage, with the training after the pruning."""
        return {
            **(self.report.get("seconds") or {}),
            **({"recovery": self.recovery["seconds"]} if self.training else {}),
        }

    @property
    def answers(self) -> Items:
        """The answers that were judged last."""
        of_each = (record.get("answers") for record in (self.evaluation, self.recovery, self.report))
        return next(filter(None, of_each), [])

    @property
    def heldout_is_disjoint(self) -> bool:
        """Whether no document that was held out has had another use, as far as the manifest knows documents."""
        held, *used = (
            {document for entry in self.manifest.get("domains", ()) for document in entry.get(name, ())}
            for name in ("heldout_documents", "documents", "probe_documents")
        )
        return not held & set().union(*used)

    @classmethod
    def read(cls, folder: str | Path, dense: str = "") -> Records:
        """The records in a folder."""
        folder = Path(folder)
        if not (folder / REPORT_NAME).is_file():
            raise StructPruneError(
                f"{folder} has no {REPORT_NAME}, so it is not what `structprune prune` or `pruner.save` wrote; name "
                "such a folder."
            )

        def read(name: str) -> Mapping[str, Any]:
            return read_json(folder / name) if (folder / name).is_file() else {}

        report = read(REPORT_NAME)
        details = Details.load(folder / DETAILS_NAME) if (folder / DETAILS_NAME).is_file() else Details()
        return cls(
            output=str(folder),
            report=report,
            details=details,
            config=read(CONFIG_NAME),
            manifest=read(MANIFEST_NAME),
            recovery=read(RECOVERY_REPORT_NAME) or report.get("recovery") or {},
            training=read(RECOVERY_CONFIG_NAME),
            evaluation=read(EVALUATION_NAME),
            speed=read(SPEED_NAME),
            dense=dense or str(details.model.get("name", "")),
        )


def short_name(source: str) -> str:
    """A model or text as people know it: an id on the Hub, or the name of a folder or file without where it lies."""
    if cached := HUB_CACHE.search(source):
        return "/".join(cached.groups())
    path = Path(source)
    local = path.is_absolute() or path.exists() or path.suffix in TEXT_FILES
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
