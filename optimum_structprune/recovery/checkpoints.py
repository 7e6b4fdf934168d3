"""The checkpoints of a training: which of them are whole, and which one it goes on from."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from zipfile import is_zipfile

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import CONFIG_NAME as MODEL_CONFIG_NAME
from transformers.utils import SAFE_WEIGHTS_NAME as MODEL_WEIGHTS_NAME

from ..config.fields import read_mapping
from ..errors import StructPruneError
from .identity import Identity, read_identity


def last_checkpoint(folder: str | None, identity: Identity, only_model: bool = False) -> str:
    """The last whole checkpoint of a training in a folder.

    A checkpoint that a kill or a full disk has cut short is passed over: the one before it is still there then.
    """
    adapter = identity.settings.get("train") != "full"
    whole = [] if folder is None else _whole_checkpoints(Path(folder), adapter, only_model)
    if not whole:
        raise StructPruneError(f"There is no checkpoint in {folder} to resume from; start without resuming.")
    stored = {path: read_identity(path) for path in whole}
    differences = {path: identity.differences(data) for path, data in stored.items() if data is not None}
    unknown = [path for path in whole if path not in differences]
    if own := [path for path in whole if path in differences and not differences[path]]:
        return str(own[0])
    if unknown:
        warnings.warn(
            f"{unknown[0]} does not say which training it belongs to, so the model, the text and the settings are "
            "not checked.",
            stacklevel=2,
        )
        return str(unknown[0])
    raise StructPruneError(
        f"{whole[0]} belongs to another training: {'; '.join(differences[whole[0]])}. Resume with what it began "
        "with, or start without resuming."
    )


def _whole_checkpoints(folder: Path, adapter: bool, only_model: bool) -> list[Path]:
    """The checkpoints that lack nothing, the last first; warns of those whose files are damaged."""
    # The Trainer writes its state last, so without it a checkpoint is known to have been cut short.
    states = folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*/{TRAINER_STATE_NAME}")
    numbered = [path.parent for path in states if path.parent.name.rpartition("-")[2].isdecimal()]
    whole = []
    for path in sorted(numbered, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True):
        if reason := _damage(path, adapter, only_model):
            warnings.warn(f"{path} is passed over: {reason}.", stacklevel=3)
        else:
            whole.append(path)
    return whole


def _damage(checkpoint: Path, adapter: bool, only_model: bool) -> str:
    """What is missing in a checkpoint or cannot be read; empty where it is whole."""
    try:
        for name in (TRAINER_STATE_NAME, CONFIG_NAME if adapter else MODEL_CONFIG_NAME):
            read_mapping(checkpoint / name, json.loads)
        read_identity(checkpoint)
        weights = [checkpoint / SAFETENSORS_WEIGHTS_NAME] if adapter else [*checkpoint.glob("model*.safetensors")]
        for path in weights:
            with safe_open(path, framework="pt"):
                pass
    except (StructPruneError, OSError, SafetensorError) as error:
        return str(error)
    if not weights:
        return f"it has no {MODEL_WEIGHTS_NAME}"
    # FSDP and DeepSpeed keep the optimizer under names of their own.
    if not only_model and not [*checkpoint.glob("*optimizer*"), *checkpoint.glob("global_step*")]:
        return "it has no state of the optimizer"
    if not only_model and not (checkpoint / SCHEDULER_NAME).is_file():
        return f"it has no {SCHEDULER_NAME}"
    # The index of what torch writes stands at the end of the file, so a file that was cut has none.
    cut = [path.name for path in (*checkpoint.glob("*.pt"), *checkpoint.glob("*.pth")) if not is_zipfile(path)]
    return f"{', '.join(sorted(cut))} cannot be read" if cut else ""
