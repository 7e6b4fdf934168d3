"""Measured losses on disk, so that they are measured once for all targets."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..config.fields import read_mapping
from ..config.pruning import StructPruneConfig
from ..errors import StructPruneError
from ..plain_json import replace_json
from ..system.fingerprint import fingerprint
from ..system.processes import process_index, wait_for_all
from .evidence import Evidence


VERSION = 1
# What of a config a trial depends on, beside the model and the text.
OF_TRIALS = ("refit", "damping", "seed")
Key = tuple[int, str]
# The losses by domain, shape `(domains,)`, by the number of units removed, by layer and kind of space.
Trials = dict[Key, dict[int, Tensor]]


@dataclass
class Known:
    """The losses that were measured for one model, text and way to prune.

    Attributes:
        path: The file that keeps them; None where nothing does.
        key: What identifies model, text and way to prune.
        trials: The losses.
    """

    path: Path | None
    key: str
    trials: Trials = field(default_factory=dict)

    @classmethod
    def load(
        cls, config: StructPruneConfig, model: PreTrainedModel, evidence: Evidence, measure: Mapping[str, Any]
    ) -> Known:
        """What the folder of a config has of these losses; nothing where it names no folder."""
        folder = config.losses_dir or config.stats or config.checkpoint_dir
        if folder is None:
            return cls(None, "")
        way = {name: value for name, value in config.to_dict().items() if name in OF_TRIALS}
        text = [{**asdict(entry), "origin": None} for entry in evidence.entries()]
        parts = [config.scored_by, way, measure, text, list(evidence.shares), fingerprint(model)]
        key = sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
        path = Path(folder) / f"losses-{key[:12]}.json"
        trials = _read(path, key, len(evidence.shares)) if path.is_file() else {}
        wait_for_all()  # before the first process writes
        return cls(path, key, trials)

    def save(self) -> None:
        """Write the file; it replaces the former one in one step."""
        if self.path is None or process_index() > 0:
            return
        losses: dict[str, dict[str, dict[str, list[float]]]] = {}
        for (layer, name), by_units in self.trials.items():
            numbers = {str(units): by_domain.tolist() for units, by_domain in by_units.items()}
            losses.setdefault(str(layer), {})[name] = numbers
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            replace_json(self.path, {"version": VERSION, "key": self.key, "losses": losses})
        except OSError as error:
            raise StructPruneError(f"Measured losses cannot be written to {self.path}: {error.strerror}.") from error


def _read(path: Path, key: str, domains: int) -> Trials:
    data = read_mapping(path, json.loads)
    try:
        if data["version"] != VERSION or data["key"] != key:
            raise ValueError(f"version {data['version']} for {str(data['key'])[:12]} where {VERSION} is read")
        trials = {
            (int(layer), name): {
                int(units): torch.tensor(losses, dtype=torch.float) for units, losses in found.items()
            }
            for layer, by_name in data["losses"].items()
            for name, found in by_name.items()
        }
        if any(losses.shape != (domains,) for by_units in trials.values() for losses in by_units.values()):
            raise ValueError(f"a loss is not of {domains} domains")
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise StructPruneError(f"{path} holds no measured losses ({error}); remove it.") from error
    return trials
