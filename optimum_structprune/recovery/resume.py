"""Remembers how a training began, so that it never goes on from a checkpoint of another one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import sort_checkpoints

from ..config.fields import read_json
from ..config.recovery import RecoveryConfig
from ..errors import StructPruneError, warn
from ..system.fingerprint import fingerprint
from ..written import plain


class TrainingInputs(TrainerCallback, ExportableState):
    """The config, model and teacher of a training, by name; a Trainer keeps them in each checkpoint."""

    def __init__(self, inputs: Mapping[str, Any]):
        self.inputs = inputs

    @classmethod
    def of(cls, config: RecoveryConfig, model: PreTrainedModel, teacher: str | None) -> TrainingInputs:
        """The inputs of a training of a model that has no adapter yet."""
        models = {"model": fingerprint(model), "dtype": model.dtype, "teacher": teacher}
        return cls(plain({**models, **config.without_output_dir().to_dict()}))

    def state(self) -> dict[str, Any]:
        """Give the Trainer what it writes into a checkpoint; see `ExportableState`."""
        return {"args": {"inputs": self.inputs}, "attributes": {}}

    def last_checkpoint(self, folder: str) -> str:
        """Find the last whole checkpoint of this training in a folder.

        The Trainer writes its state last, so a checkpoint that a kill or a full disk cut short has none that can be
        read, and is passed over.
        """
        for checkpoint in reversed(sort_checkpoints(folder)):
            try:
                callbacks = read_json(Path(checkpoint, TRAINER_STATE_NAME))["stateful_callbacks"]
                stored = callbacks[type(self).__name__]["args"]["inputs"]
            except (StructPruneError, LookupError, TypeError) as error:
                warn(f"{checkpoint} is passed over: {error}.")
                continue
            if different := [name for name, value in self.inputs.items() if stored.get(name) != value]:
                values = (f"{name} {stored.get(name)} there and {self.inputs[name]} here" for name in different)
                raise StructPruneError(
                    f"{checkpoint} belongs to another training: {'; '.join(values)}. Resume with what it began with, "
                    "or start without resuming."
                )
            return checkpoint
        raise StructPruneError(f"There is no checkpoint in {folder} to resume from; start without resuming.")
