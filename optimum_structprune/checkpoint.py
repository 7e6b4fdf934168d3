"""What a round has reached, on disk, so that a run that was killed goes on from there."""

from __future__ import annotations

import json
import shutil
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .errors import StructPruneError
from .fingerprint import fingerprint
from .plan import Plan
from .sweep import Snapshot, Sweep


if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .config import StructPruneConfig

STATE = "rounds.json"
CONSUMERS = "rounds.safetensors"
# What may change without making a half-finished run another one.
FREE = ("checkpoint_dir", "batch_size")


def run_key(config: StructPruneConfig, model: PreTrainedModel, steps: Any) -> str:
    """SHA-256 of the config, of the dense model and of the widths of all rounds."""
    wanted = {name: value for name, value in config.to_dict().items() if name not in FREE}
    return sha256(json.dumps([wanted, fingerprint(model), steps], sort_keys=True, default=str).encode()).hexdigest()


def save_round(folder: Path, sweep: Sweep, number: int, key: str) -> None:
    """Keep the consumers as they are after a round, and what is kept; replaces what an earlier round left.

    Args:
        folder: Where to.
        sweep: The rounds.
        number: Of the finished round, from 1.
        key: Of the run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    staging = folder / ".rounds"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    tensors = {}
    for index, (weight, bias) in enumerate(sweep.snapshot().consumers.values()):
        tensors[f"{index}.weight"] = weight.contiguous()
        if bias is not None:
            tensors[f"{index}.bias"] = bias.contiguous()
    save_file(tensors, staging / CONSUMERS)
    state = {"key": key, "round": number, "shares": sweep.mixture.shares, "plan": sweep.plan.to_dict()}
    (staging / STATE).write_text(json.dumps(state))
    # The state names the round, so it goes last: without it the folder counts as empty.
    (folder / STATE).unlink(missing_ok=True)
    for name in (CONSUMERS, STATE):
        (staging / name).replace(folder / name)
    staging.rmdir()


def load_round_(folder: Path, sweep: Sweep, key: str) -> int:
    """Bring a model and its sweep to where a run was; returns the number of finished rounds, 0 where there are none.

    Args:
        folder: What `save_round` was given.
        sweep: Of the dense model.
        key: Of the run.

    Raises:
        StructPruneError: If the folder belongs to another run, or is damaged.
    """
    if not (folder / STATE).exists():
        return 0
    try:
        state = json.loads((folder / STATE).read_text())
        tensors = load_file(folder / CONSUMERS)
        if state["key"] != key:
            raise StructPruneError(
                f"{folder} holds round {state['round']} of a run with another model or config; name another "
                "checkpoint_dir, or remove the folder."
            )
        plan = Plan.from_dict(state["plan"])
        number, shares = int(state["round"]), tuple(state["shares"])
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise StructPruneError(f"{folder} is not a readable checkpoint ({error}); remove it to start anew.") from error
    axes = [axis for space in sweep.spec.spaces if (space.layer, space.name) in plan.keep for axis in space.into]
    sweep.mixture.shares = shares
    consumers = {axis: (tensors[f"{i}.weight"], tensors.get(f"{i}.bias")) for i, axis in enumerate(axes)}
    sweep.resume_(Snapshot(plan.keep, consumers))
    return number
