"""Trainings that spread the weights over processes: what is refused, and how the weights come back whole."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import TrainingArguments

from ..config.recovery import RecoveryConfig
from ..errors import StructPruneError
from ..system.processes import check_launch


M = TypeVar("M", bound=nn.Module)

# The devices that accelerate shards over; on others it ignores the setting without a word.
DEVICES = ["cuda", "xpu", "npu", "hpu", "mlu", "musa"]
# What the names of the variables begin with that accelerate sets where it shards.
VARIABLES = ("ACCELERATE_USE_FSDP", "FSDP_")


def check_deepspeed(config: RecoveryConfig) -> None:
    """Refuse DeepSpeed, before transformers sets up anything for it."""
    check_launch()
    if config.training.get("deepspeed"):
        raise StructPruneError(
            "training's deepspeed is not supported, because DeepSpeed keeps the trained weights in a form of its own; "
            "leave it out, and every process holds the whole model, or on GPUs set fsdp=True, which shards weights, "
            "gradients and the optimizer over them."
        )


def check_sharding(arguments: TrainingArguments, device: str) -> None:
    """Refuse an FSDP that would do nothing, or not come to an end."""
    if not arguments.fsdp:
        return
    if device not in DEVICES:
        raise StructPruneError(
            f"training's fsdp shards a model over GPUs, and on {device!r} accelerate ignores it without a word; leave "
            "it out, and every process holds the whole model."
        )
    if arguments.world_size < 2:
        raise StructPruneError(
            "training's fsdp shards a model over several processes, and this one is alone; start them with torchrun, "
            "or leave it out."
        )
    settings = arguments.fsdp_config
    if isinstance(settings, dict) and int(settings.get("version", 2)) != 2:
        raise StructPruneError(
            f"training's fsdp_config has version {settings['version']}, whose weights do not keep their names; set 2."
        )


@contextmanager
def to_train(model: M, arguments: TrainingArguments) -> Iterator[M]:
    """The model that the Trainer gets: the model itself, or with FSDP a copy, because what it shards stays in shards.

    All processes have to come to the end of `with`, where the model takes over what was trained.
    """
    if not arguments.fsdp:
        yield model
        return
    # accelerate tells the rest of the process through the environment, as if it had been launched that way.
    before = dict(os.environ)
    try:
        copied = deepcopy(model)
        yield copied
        take_over_(model, copied)
    finally:
        for name in [name for name in os.environ if name.startswith(VARIABLES)]:
            if name in before:
                os.environ[name] = before[name]
            else:
                del os.environ[name]


@torch.no_grad()
def take_over_(model: nn.Module, trained: nn.Module) -> None:
    """Give a model the values of what is trainable in it. All processes have to come here."""
    shards = dict(trained.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            shard = shards[name].to(parameter.device)
            parameter.copy_(shard.full_tensor() if isinstance(shard, DTensor) else shard)


def own_shard(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
