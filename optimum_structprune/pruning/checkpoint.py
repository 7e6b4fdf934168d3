"""What a round has reached, on disk, so that a run that was killed goes on from there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..domains.manifest import Entry
from ..errors import StructPruneError
from ..fingerprint import fingerprint
from ..surgery.plan import Plan
from .sweep import Snapshot, Sweep


if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..config.pruning import StructPruneConfig

STATE = "rounds.json"
CONSUMERS = "rounds.safetensors"
# What may change without making a half-finished run another one; the text itself is held against the checkpoint.
FREE = ("checkpoint_dir", "batch_size", "domains", "presets_file")


def run_key(config: StructPruneConfig, model: PreTrainedModel, text: Sequence[Entry], steps: Any) -> str:
    """SHA-256 of the config, of the dense model, of the calibration tokens and of the widths of all rounds."""
    wanted = {name: value for name, value in config.to_dict().items() if name not in FREE}
    parts = [wanted, [{**asdict(entry), "origin": None} for entry in text], fingerprint(model), steps]
    return sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Checkpoint:
    """A folder that remembers the last finished round of one run.

    Attributes:
        folder: Where.
        key: Of the run.
    """

    folder: Path
    key: str

    def save(self, sweep: Sweep, number: int, measured: Sequence[Mapping[str, Any]]) -> None:
        """Keep the consumers as they are after a round, and what is kept; replaces what an earlier round left.

        Args:
            sweep: The rounds.
            number: Of the finished round, from 1.
            measured: What the report says of the rounds.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        staging = self.folder / ".rounds"
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        tensors = {}
        for index, (weight, bias) in enumerate(sweep.snapshot().consumers.values()):
            tensors[f"{index}.weight"] = weight.contiguous()
            if bias is not None:
                tensors[f"{index}.bias"] = bias.contiguous()
        save_file(tensors, staging / CONSUMERS)
        state = {"key": self.key, "round": number, "shares": sweep.mixture.shares, "plan": sweep.plan.to_dict()}
        (staging / STATE).write_text(json.dumps({**state, "measured": measured}))
        # The state names the round, so it goes last: without it the folder counts as empty.
        (self.folder / STATE).unlink(missing_ok=True)
        for name in (CONSUMERS, STATE):
            (staging / name).replace(self.folder / name)
        staging.rmdir()

    def load_(self, sweep: Sweep) -> tuple[int, list[dict[str, Any]]]:
        """Bring a dense model and its sweep to where a run was.

        Args:
            sweep: Of the dense model.

        Returns:
            The number of finished rounds, 0 where the folder remembers none, and what the report said of them.

        Raises:
            StructPruneError: If the folder belongs to another run, or is damaged; nothing has changed then.
        """
        if not (self.folder / STATE).exists():
            return 0, []
        with self._readable():
            state = json.loads((self.folder / STATE).read_text())
            number, key, measured = int(state["round"]), state["key"], list(state["measured"])
        if key != self.key:
            raise StructPruneError(
                f"{self.folder} holds round {number} of a run with another model, config or calibration text; name "
                "another checkpoint_dir, or remove the folder."
            )
        with self._readable():
            tensors = load_file(self.folder / CONSUMERS)
            snapshot = _snapshot(sweep, Plan.from_dict(state["plan"]), tensors, tuple(state["shares"]))
        sweep.resume_(snapshot)
        return number, measured

    @contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise StructPruneError(
                f"{self.folder} is not a readable checkpoint ({error}); remove it to start anew."
            ) from error


def _snapshot(sweep: Sweep, plan: Plan, tensors: Mapping[str, Tensor], shares: tuple[float, ...]) -> Snapshot:
    axes = [axis for space in sweep.arch.spaces if (space.layer, space.name) in plan.keep for axis in space.into]
    consumers = {axis: (tensors[f"{i}.weight"], tensors.get(f"{i}.bias")) for i, axis in enumerate(axes)}
    return Snapshot(plan.keep, consumers, shares)
