"""Choose the `TrainingArguments` of a recovery by the hardware and the number of tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from typing import Any, get_args, get_type_hints

import torch
from transformers import TrainingArguments

from ..config.fields import build
from ..config.recovery import LEARNING_RATES, TRAINING, RecoveryConfig
from ..distillation.chunked_loss import device_kind
from ..system.errors import StructPruneError


# A training has about this number of steps, as far as the batch size allows. With the same number of tokens, many
# small steps come nearer to the teacher than few large steps.
STEPS = 800
# The maximum number of samples in a step, and the number of samples that run at once by the kind of device.
MAX_BATCH_SAMPLES = 64
SAMPLES_AT_ONCE = {"cpu": 4, "gpu": 8}
# Evaluations take at most a tenth of the time. A forward pass of both models takes about half of a training step.
MAX_EVALUATIONS = 8
EVALUATION_SHARE = 0.1
EVALUATION_COST = 0.5
# Fields of `TrainingArguments` that this module computes with.
POSITIVE_NUMBERS = ("per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs")
# The values that stand for `no`, by argument.
YAML_NO = {"save_strategy": "no", "eval_strategy": "no", "logging_strategy": "no", "report_to": "none"}


def computes_in_bf16(device_type: str) -> bool:
    """Return whether a kind of device has instructions for bfloat16, so that mixed precision is faster."""
    if device_type == "cuda":
        # torch also reports emulated support. NVIDIA has the instructions since Ampere.
        return torch.version.hip is not None or torch.cuda.get_device_capability() >= (8, 0)
    if device_type != "cpu":
        return False
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        supported = getattr(torch.cpu, name, None)  # not in all releases of torch
        if supported is not None and supported():
            return True
    return False


@dataclass(frozen=True)
class TrainingSize:
    """The number of samples of a training, their length, and the number of samples that are evaluated each time."""

    num_samples: int
    seq_length: int
    num_validation: int = 1


def training_arguments(
    config: RecoveryConfig, size: TrainingSize, seed: int, on_cpu: bool, scratch: str
) -> TrainingArguments:
    """Return the arguments of the Trainer: the defaults, overridden by `config.training`.

    Args:
        config: How the model is trained.
        size: The size of the training.
        seed: The seed.
        on_cpu: Whether the training runs on the CPU.
        scratch: The folder for checkpoints if the config has no `output_dir`.
    """
    own = dict(config.training)
    _check_numbers(own)
    # YAML reads `no` as False.
    for name, value in YAML_NO.items():
        if own.get(name) is False:
            own[name] = value
    device = torch.device("cuda")
    if on_cpu:
        device = torch.device("cpu")

    settings: dict[str, Any] = dict(TRAINING)
    settings["learning_rate"] = LEARNING_RATES[config.train or "lora"]
    settings["seed"] = seed
    settings["use_cpu"] = on_cpu
    settings["bf16"] = not own.get("fp16") and computes_in_bf16(device.type)

    # The columns of a sample are inputs of the collator, not of the model.
    settings["remove_unused_columns"] = False
    # Every process reads the stream and selects its part of each batch.
    settings["accelerator_config"] = {"dispatch_batches": False}
    settings["logging_nan_inf_filter"] = False

    strategy = own.get("save_strategy", "steps")
    interval = own.get("save_steps", 1)
    settings.update(save_strategy=strategy, save_steps=interval, save_total_limit=1)
    settings.update(eval_strategy=strategy, eval_steps=interval, load_best_model_at_end=strategy != "no")
    if "output_dir" not in own:
        # No training resumes from a scratch folder.
        settings.update(output_dir=scratch, save_only_model=True)

    if own.get("eval_strategy") == "no":
        settings["load_best_model_at_end"] = False

    settings.update(own)
    batch = batch_samples(size)
    samples_at_once = SAMPLES_AT_ONCE[device_kind(device)]
    settings.setdefault("per_device_train_batch_size", min(batch, samples_at_once))
    settings.setdefault("per_device_eval_batch_size", min(4, settings["per_device_train_batch_size"]))

    epochs = settings.pop("num_train_epochs", 1)
    arguments = build(TrainingArguments, settings)
    if arguments.per_device_eval_batch_size < 1:
        raise StructPruneError(
            f"`per_device_eval_batch_size` must be at least 1, got {arguments.per_device_eval_batch_size}."
        )

    # `nn.DataParallel` would cut the batches of one process for several GPUs, and cannot train with a teacher.
    arguments._n_gpu = min(arguments.n_gpu, 1)

    processes = max(1, arguments.world_size)
    if "per_device_train_batch_size" not in own:
        # The processes share the samples of a step.
        share = batch / processes
        if "gradient_accumulation_steps" not in own:
            arguments.gradient_accumulation_steps = ceil(share / samples_at_once)
        samples = round(share / max(1, arguments.gradient_accumulation_steps))
        arguments.per_device_train_batch_size = max(1, min(samples, samples_at_once))

    per_process = arguments.per_device_train_batch_size * max(1, arguments.gradient_accumulation_steps)
    per_step = max(1, per_process) * processes
    if arguments.max_steps <= 0:
        arguments.max_steps = max(1, round(epochs * -(-size.num_samples // per_step)))

    if "save_steps" not in own:
        arguments.save_steps = arguments.eval_steps = max(1, arguments.max_steps // evaluations(size))
    if "logging_steps" not in own:
        arguments.logging_steps = max(1, min(10, arguments.max_steps // 20))
    return arguments


def _check_numbers(training: Mapping[str, Any]) -> None:
    """Raise if a numeric setting is not a number, or a setting that is computed with is not positive."""
    hints = get_type_hints(TrainingArguments)
    for name, value in training.items():
        types = set(get_args(hints.get(name)) or [hints.get(name)])
        if value is None or types.isdisjoint({int, float}) or not types.isdisjoint({str, bool}):
            continue

        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        kind = "number"
        if name in POSITIVE_NUMBERS:
            kind = "positive number"
        if not is_number or (name in POSITIVE_NUMBERS and value <= 0):
            raise StructPruneError(f"`{name}` in `training` must be a {kind}, got {value!r}.")


def batch_samples(size: TrainingSize) -> int:
    """Return the number of samples in a step, which grows with the number of samples."""
    return max(1, min(MAX_BATCH_SAMPLES, round(size.num_samples / STEPS)))


def evaluations(size: TrainingSize) -> int:
    """Return the number of evaluations of a training."""
    affordable = EVALUATION_SHARE * size.num_samples / (EVALUATION_COST * max(1, size.num_validation))
    return max(1, min(MAX_EVALUATIONS, int(affordable)))
