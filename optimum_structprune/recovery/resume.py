"""Which training an adapter or a checkpoint belongs to, so that a training never resumes another one."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import sort_checkpoints

from ..config.fields import read_json
from ..config.recovery import LORA, TRAINING, RecoveryConfig
from ..errors import StructPruneError, warn
from ..system.fingerprint import tensor_hash, weights_hash
from ..written import plain, replace_json


INPUTS_NAME = "recovery_inputs.json"
# What the fields of `TrainingArguments` begin with that change no step of a training.
WITHOUT_EFFECT = ("output_dir", "logging_", "save_st", "save_total", "report_to", "disable_tqdm")
DIGITS = 12  # of a hash in a message


class TrainingInputs(TrainerCallback, ExportableState):
    """All that decides which weights come out of a training, by name; a Trainer keeps it in each checkpoint."""

    def __init__(self, inputs: Mapping[str, Any]):
        self.inputs = inputs

    @classmethod
    def of(
        cls,
        config: RecoveryConfig,
        arguments: TrainingArguments,
        model: PreTrainedModel,
        ids: Tensor,
        teacher: PreTrainedModel | None,
    ) -> TrainingInputs:
        """The inputs of a training on token ids, shape `(tokens,)`, before the model has an adapter."""
        hashes = {"model": weights_hash(model), "text": tensor_hash(ids)}
        hashes["teacher"] = "none" if teacher is None else weights_hash(teacher)
        settings = {name: getattr(config, name) for name in ("train", "kl_weight")}
        lora = {f"lora.{name}": value for name, value in {**LORA, **config.lora}.items()}
        used = {name: getattr(arguments, name) for name in ("learning_rate", "per_device_train_batch_size", "seed")}
        given = {**TRAINING, **config.training, **used}
        training = {name: value for name, value in given.items() if not name.startswith(WITHOUT_EFFECT)}
        return cls(plain({**hashes, "dtype": model.dtype, **settings, **lora, **training}))

    def state(self) -> dict[str, Any]:
        """What the Trainer writes into a checkpoint; see `ExportableState`."""
        return {"args": {"inputs": self.inputs}, "attributes": {}}

    def save(self, folder: Path) -> None:
        """Write the inputs into the folder of an adapter."""
        replace_json(folder / INPUTS_NAME, self.inputs)

    def differences(self, stored: Mapping[str, Any]) -> str:
        """How stored inputs differ from these, with both values of each difference; empty where they are the same."""
        values = {name: (stored.get(name), self.inputs.get(name)) for name in {**self.inputs, **stored}}
        return "; ".join(
            f"{name} {_short(there)} there and {_short(here)} here"
            for name, (there, here) in values.items()
            if there != here
        )

    def last_checkpoint(self, folder: str) -> str:
        """The last checkpoint of this training in a folder; one that a kill or full disk cut short is passed over."""
        for checkpoint in reversed(sort_checkpoints(folder)):
            try:
                state = read_json(Path(checkpoint, TRAINER_STATE_NAME))
                stored = state["stateful_callbacks"][type(self).__name__]["args"]["inputs"]
                for part in ("optimizer", "scheduler"):
                    if not any(Path(checkpoint).glob(f"{part}*")):
                        raise StructPruneError(f"it has no {part}")
            except (StructPruneError, LookupError, TypeError) as error:
                warn(f"{checkpoint} is passed over: {error}.")
                continue
            if differences := self.differences(stored):
                raise StructPruneError(
                    f"{checkpoint} belongs to another training: {differences}. Resume with what it began with, or "
                    "start without resuming."
                )
            return checkpoint
        raise StructPruneError(f"There is no checkpoint in {folder} to resume from; start without resuming.")


def model_of(folder: str | Path) -> str | None:
    """The `weights_hash` of the model that the adapter in a folder was trained on; None where nothing says it."""
    path = Path(folder, INPUTS_NAME)
    return str(read_json(path).get("model")) if path.is_file() else None


def _short(value: Any) -> str:
    """A value in a message; of a hash, its first digits."""
    return f"{value[:DIGITS]}…" if isinstance(value, str) and len(value) == sha256().digest_size * 2 else str(value)
