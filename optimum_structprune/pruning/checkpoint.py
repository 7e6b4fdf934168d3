"""What a round has reached, on disk, so that a run that was killed goes on from there."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from ..arch.spec import ArchSpec, Widths
from ..config.pruning import StructPruneConfig
from ..domains.manifest import Entry
from ..errors import StructPruneError
from ..record.details import choices_of_list, choices_to_list
from ..surgery.plan import Plan
from ..system.fingerprint import fingerprint
from ..system.processes import process_index, wait_for_all
from .units import Snapshot


STATE = "rounds.json"
# What may change without making a half-finished run another one; the text itself is held against the checkpoint.
FREE = ("checkpoint_dir", "losses_dir", "batch_size", "domains")


def run_key(config: StructPruneConfig, model: PreTrainedModel, text: Sequence[Entry], target: Widths) -> str:
    """SHA-256 of the config, of the dense model, of the calibration tokens and of the widths that are aimed at."""
    wanted = {name: value for name, value in config.to_dict().items() if name not in FREE}
    parts = [wanted, [{**asdict(entry), "origin": None} for entry in text], fingerprint(model), target]
    return sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class State:
    """What a checkpoint holds.

    Attributes:
        number: The number of finished rounds.
        shares: The weights of the domains in the next round.
        snapshot: The kept units and the consumers.
        measured: What the report says of the finished rounds.
    """

    number: int
    shares: tuple[float, ...]
    snapshot: Snapshot
    measured: list[dict[str, Any]]


@dataclass(frozen=True)
class Checkpoint:
    """A folder that remembers the last finished round of one run.

    Attributes:
        folder: The folder; it is made when the first round is saved.
        key: What identifies the run; see `run_key`.
    """

    folder: Path
    key: str

    def save(
        self, snapshot: Snapshot, shares: Sequence[float], number: int, measured: Sequence[Mapping[str, Any]]
    ) -> None:
        """Keep what a round has reached, in place of what an earlier round has left.

        The state names the file of the tensors and replaces the former state in one step, after they are written. So a
        kill at any moment leaves one whole round.
        """
        if process_index() == 0:
            self._write(snapshot, shares, number, measured)
        wait_for_all()

    def _write(
        self, snapshot: Snapshot, shares: Sequence[float], number: int, measured: Sequence[Mapping[str, Any]]
    ) -> None:
        tensors = {}
        for index, (weight, bias) in enumerate(snapshot.consumers.values()):
            tensors[f"{index}.weight"] = weight.contiguous()
            if bias is not None:
                tensors[f"{index}.bias"] = bias.contiguous()
        name = f"round-{number}.safetensors"
        plan = Plan("", snapshot.keep).to_dict()
        state = {"key": self.key, "round": number, "tensors": name, "shares": list(shares), "plan": plan}
        state["choices"] = choices_to_list(snapshot.choices)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file(tensors, self.folder / name)
            (self.folder / f"{STATE}.new").write_text(json.dumps({**state, "measured": measured}))
            (self.folder / f"{STATE}.new").replace(self.folder / STATE)
            for older in set(self.folder.glob("round-*.safetensors")) - {self.folder / name}:
                older.unlink()
        except (OSError, SafetensorError) as error:
            raise StructPruneError(
                f"Round {number} could not be saved to {self.folder}: {error}. The last saved round is intact, and "
                "the same call goes on from it."
            ) from error

    def load(self, arch: ArchSpec) -> State | None:
        """What was saved last; None where the folder remembers no round."""
        if not (self.folder / STATE).exists():
            return None
        with readable(self.folder):
            state = json.loads((self.folder / STATE).read_text())
            number, key = int(state["round"]), state["key"]
            measured = [_measured(entry) for entry in state["measured"]]
        if key != self.key:
            raise StructPruneError(
                f"{self.folder} holds round {number} of a run with another model, config or calibration text; name "
                "another checkpoint_dir, or remove the folder."
            )
        with readable(self.folder):
            tensors = load_file(self.folder / state["tensors"])
            keep = Plan.from_dict(state["plan"]).keep
            # Checkpoints of before have no choices.
            snapshot = replace(_snapshot(arch, keep, tensors), choices=choices_of_list(state.get("choices", [])))
            return State(number, tuple(state["shares"]), snapshot, measured)


@contextmanager
def readable(folder: Path) -> Iterator[None]:
    """Turn whatever a damaged checkpoint causes inside `with` into one error."""
    try:
        yield
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StructPruneError(f"{folder} is not a readable checkpoint ({error}); remove it to start anew.") from error


def _snapshot(
    arch: ArchSpec, keep: Mapping[tuple[int, str], tuple[int, ...]], tensors: Mapping[str, Tensor]
) -> Snapshot:
    axes = [axis for space in arch.spaces if (space.layer, space.name) in keep for axis in space.into]
    return Snapshot(keep, {axis: (tensors[f"{i}.weight"], tensors.get(f"{i}.bias")) for i, axis in enumerate(axes)})


def _measured(entry: Mapping[str, Any]) -> dict[str, Any]:
    """An entry of the report; JSON has made text of the numbers of layers."""
    widths = {
        name: {int(layer): units for layer, units in width.items()} if isinstance(width, dict) else width
        for name, width in entry["widths"].items()
    }
    return {**entry, "widths": widths}
