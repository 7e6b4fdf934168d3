"""The finished layers of the last round, on disk, so that a run that was killed goes on at the next one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..calibration.passes import PassesState
from ..errors import StructPruneError
from ..record.details import Choices, choices_of_list, choices_to_list
from ..surgery.plan import Plan
from ..system.processes import process_count, process_index, wait_for_all
from .checkpoint import readable


STATE = "layers.json"


@dataclass(frozen=True)
class Progress:
    """A folder that remembers the layers that one run has finished.

    Attributes:
        folder: The folder; it is made when the first layer is saved.
        key: What identifies the run and its round; see `checkpoint.run_key`.
    """

    folder: Path
    key: str

    def save(
        self, layer: int, plan: Plan, tensors: Mapping[str, Tensor], passes: PassesState, choices: Choices
    ) -> None:
        """Keep a finished layer, and what the next one starts from.

        The state names its files and replaces the former state in one step, after they are written. So a kill at any
        moment leaves the layers before.
        """
        mine = f"{process_index()}-of-{process_count()}"
        name = f"passes-{layer}-{mine}.safetensors"
        values = {"key": self.key, "processes": process_count(), "layers": layer + 1}
        values |= {"plan": plan.to_dict(), "values": passes.values}
        values["choices"] = choices_to_list(choices)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            _write(self.folder / name, passes.tensors)
            wait_for_all()
            if process_index() == 0:
                _write(self._layer(layer), tensors)
                (self.folder / f"{STATE}.new").write_text(json.dumps(values))
                (self.folder / f"{STATE}.new").replace(self.folder / STATE)
            wait_for_all()
            for older in set(self.folder.glob(f"passes-*-{mine}.safetensors")) - {self.folder / name}:
                older.unlink()
        except (OSError, SafetensorError) as error:
            raise StructPruneError(
                f"Layer {layer} could not be saved to {self.folder}: {error}. The layers before are intact, and the "
                "same call goes on from them."
            ) from error

    def load(self) -> Finished | None:
        """What was saved last; None where the folder remembers no layer."""
        state = self.check()
        if state is None:
            return None
        with readable(self.folder):
            layers = int(state["layers"])
            name = f"passes-{layers - 1}-{process_index()}-of-{process_count()}.safetensors"
            passes = PassesState(load_file(self.folder / name), dict(state["values"]))
            # What a version before this one has saved has no choices.
            choices = choices_of_list(state.get("choices", []))
            return Finished(layers, Plan.from_dict(state["plan"]), passes, choices)

    def check(self) -> dict[str, Any] | None:
        """The description of what was saved last; None where the folder remembers no layer."""
        if not (self.folder / STATE).exists():
            return None
        with readable(self.folder):
            state = json.loads((self.folder / STATE).read_text())
            key, layers, processes = state["key"], int(state["layers"]), int(state["processes"])
        if key != self.key:
            raise StructPruneError(
                f"{self.folder} holds {layers} layers of a run with another model, config or calibration text; name "
                "another checkpoint_dir, or remove the folder."
            )
        if processes != process_count():
            raise StructPruneError(
                f"{self.folder} holds {layers} layers of a run with {processes} processes, each with its part of the "
                f"samples, and this run has {process_count()}; start {processes}, or remove the folder to start anew."
            )
        return state

    def tensors(self, layer: int) -> dict[str, Tensor]:
        """The tensors of a finished layer, by their names inside it."""
        with readable(self.folder):
            return load_file(self._layer(layer))

    def _layer(self, layer: int) -> Path:
        return self.folder / f"layer-{layer:03d}.safetensors"


@dataclass(frozen=True)
class Finished:
    """What a folder remembers.

    Attributes:
        layers: The number of finished layers.
        plan: The units that they keep.
        passes: What the passes over the samples have reached.
        choices: How these units were chosen, in summary.
    """

    layers: int
    plan: Plan
    passes: PassesState
    choices: Choices


def _write(path: Path, tensors: Mapping[str, Any]) -> None:
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)
