"""What a training was: the model, the text, the teacher and the settings, so that nothing of another one is taken for
its own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from transformers import PreTrainedModel, TrainingArguments

from ..config.fields import read_mapping
from ..config.recovery import RecoveryConfig
from ..plain_json import plain, replace_json
from ..system.fingerprint import raw_bytes
from ..system.offloading import weight_of


IDENTITY_NAME = "recovery_identity.json"
# Fields of `RecoveryConfig` that are named by what they lead to (text, adapter, Trainer), or that change no step of
# the training.
ELSEWHERE = {
    "tokens",
    "seq_length",
    "domains",
    "lora",
    "training",
    "teacher_logits",
    "merge",
    "every_round",
    "seed",
}
# Fields of `TrainingArguments` that change the weights which come out.
TRAINING_FIELDS = (
    "seed",
    "data_seed",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "dataloader_drop_last",
    "train_sampling_strategy",
    "learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "optim",
    "optim_args",
    "optim_target_modules",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "label_smoothing_factor",
    "neftune_noise_alpha",
    "bf16",
    "fp16",
)
DIGITS = 12  # so many of a hash are shown


@dataclass
class Identity:
    """What a training was.

    Attributes:
        model: The `weights_hash` of the model that is trained, before it has an adapter.
        text: The SHA-256 of the training samples, in hexadecimal digits.
        teacher: The `weights_hash` of the teacher; None without one, or where its predictions were written by a
            version that did not keep it.
        settings: The settings that change the weights which come out, by name.
    """

    model: str
    text: str
    teacher: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    def save(self, folder: str | Path) -> None:
        """Write `recovery_identity.json` into a folder."""
        replace_json(Path(folder, IDENTITY_NAME), asdict(self))

    def differences(self, stored: Mapping[str, Any]) -> list[str]:
        """How a stored identity differs from this one, with both values of each difference."""
        mine = plain(asdict(self))
        found = [
            f"{name} {_short(stored.get(name))} there and {_short(mine[name])} here"
            for name in ("model", "text", "teacher")
            if stored.get(name) != mine[name]
        ]
        theirs, ours = stored.get("settings", {}), mine["settings"]
        # Another version of this package or of peft may know more settings, or fewer.
        found += [
            f"{name}={theirs[name]!r} there and {ours[name]!r} here"
            for name in ours
            if name in theirs and theirs[name] != ours[name]
        ]
        return found


def read_identity(folder: str | Path) -> Mapping[str, Any] | None:
    """What `Identity.save` wrote; None where there is no such file, as in a folder of an earlier version."""
    path = Path(folder, IDENTITY_NAME)
    return read_mapping(path, json.loads) if path.is_file() else None


def settings_of(
    config: RecoveryConfig, adapter: PeftConfig | None, arguments: TrainingArguments, dtype: Any
) -> dict[str, Any]:
    """The settings that change the weights which come out of a training, by name."""
    own = {name: value for name, value in config.to_dict().items() if name not in ELSEWHERE}
    training = {name: getattr(arguments, name, None) for name in TRAINING_FIELDS}
    kind = {} if adapter is None else {f"{config.train}.{name}": value for name, value in adapter.to_dict().items()}
    return {"dtype": str(dtype), **own, **training, **kind}


@torch.no_grad()
def weights_hash(model: PreTrainedModel) -> str:
    """The SHA-256 of a model's type and of its weights as bfloat16, in hexadecimal digits.

    A model therefore keeps its hash when it is saved and loaded again, in float32 or in bfloat16, and when accelerate
    has put some of it on the disk.
    """
    digest = sha256(str(model.config.model_type).encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        weight = weight_of(model, name) if tensor.is_meta else tensor
        weight = weight.to(torch.bfloat16) if weight.is_floating_point() else weight
        digest.update(raw_bytes(weight))
    return digest.hexdigest()


def _short(value: Any) -> str:
    return f"{value[:DIGITS]}…" if isinstance(value, str) else str(value)
