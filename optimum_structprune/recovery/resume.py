"""Record the inputs of a training, so that it never resumes from a checkpoint of another training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import sort_checkpoints

from ..config.fields import read_json
from ..config.pruning import StructPruneConfig
from ..config.recovery import RecoveryConfig
from ..system.codec import to_plain
from ..system.errors import StructPruneError, warn
from ..system.fingerprint import fingerprint


# The end of the names of hashes.
HASH_SUFFIX = "_sha256"


class TrainingInputs(TrainerCallback, ExportableState):
    """The config, model and teacher of a training by name. A Trainer saves them in each checkpoint.

    Args:
        inputs: The values by name.
    """

    def __init__(self, inputs: Mapping[str, Any]):
        self.inputs = inputs

    @classmethod
    def of(
        cls, config: RecoveryConfig, text: StructPruneConfig, model: PreTrainedModel, teacher: str | None
    ) -> TrainingInputs:
        """Return the inputs of a training, for a model without an adapter.

        Args:
            config: The config of the recovery.
            text: The config of the training text; see `text_config`.
            model: The model.
            teacher: The name of the teacher, or None.
        """
        values: dict[str, Any] = {"model": fingerprint(model), "dtype": model.dtype, "teacher": teacher}
        values.update(replace(config, domains=text.domains).without_output_dir().to_dict())
        values["pruning_seed"] = text.seed
        return cls(to_plain(values))

    def state(self) -> dict[str, Any]:
        """Return the values that the Trainer writes into a checkpoint; see `ExportableState`."""
        return {"args": {"inputs": self.inputs}, "attributes": {}}

    def last_checkpoint(self, folder: str) -> str:
        """Return the last complete checkpoint of this training in a folder.

        The Trainer writes its state last. A checkpoint that a kill or a full disk interrupted has no readable state,
        and is skipped.

        Raises:
            StructPruneError: If the folder has no checkpoint, or the last checkpoint belongs to another training.
        """
        for checkpoint in reversed(sort_checkpoints(folder)):
            try:
                callbacks = read_json(Path(checkpoint, TRAINER_STATE_NAME))["stateful_callbacks"]
                stored = callbacks[type(self).__name__]["args"]["inputs"]
            except (StructPruneError, LookupError, TypeError) as error:
                warn(f"{checkpoint} is skipped: {error}.")
                continue

            self._check(checkpoint, stored)
            return checkpoint

        raise StructPruneError(f"{folder} has no checkpoint to resume from. Start without resuming.")

    def _check(self, checkpoint: str, stored: Mapping[str, Any]) -> None:
        """Raise if the inputs in a checkpoint differ from the inputs of this training."""
        different = differences(stored, self.inputs)
        if different:
            raise StructPruneError(
                f"{checkpoint} belongs to another training: {'; '.join(different)}. Resume with the same inputs, or "
                "start without resuming."
            )


def differences(stored: Mapping[str, Any], values: Mapping[str, Any]) -> list[str]:
    """Return a phrase for each of the values that differs from the stored value.

    A hash means nothing to a user, so `calibration_text_sha256` becomes "another calibration text".
    """
    phrases = []
    for name, value in values.items():
        if stored.get(name) == value:
            continue
        if name.endswith(HASH_SUFFIX):
            phrases.append(f"another {name.removesuffix(HASH_SUFFIX).replace('_', ' ')}")
        else:
            phrases.append(f"{name} {stored.get(name)} there and {value} here")
    return phrases
