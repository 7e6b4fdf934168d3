"""Recovery with FSDP: the Trainer shards a copy of the model, which takes the trained values over."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import TypeVar

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import TrainingArguments

from ..errors import StructPruneError


M = TypeVar("M", bound=nn.Module)

# The devices that accelerate shards over; on others it ignores the setting without a word.
SHARDING_DEVICES = ["cuda", "xpu", "npu", "hpu", "mlu", "musa"]


def check_sharding(arguments: TrainingArguments, device: str) -> None:
    """Refuse an FSDP that would do nothing, or not come to an end."""
    if not arguments.fsdp:
        return
    if device not in SHARDING_DEVICES:
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
    """The model that the Trainer gets: itself, or with FSDP a copy in shards, from which it takes the values over."""
    if not arguments.fsdp:
        yield model
        return
    before = set(os.environ)
    try:
        copied = deepcopy(model)
        yield copied
        take_over_(model, copied)
    finally:
        # accelerate tells the rest of the process through the environment, as if it had been launched that way.
        for name in set(os.environ) - before:
            if name.startswith(("ACCELERATE_USE_FSDP", "FSDP_")):
                del os.environ[name]


@torch.no_grad()
def take_over_(model: nn.Module, trained: nn.Module) -> None:
    """Give a model the values of what is trainable in it, which may be in shards; all processes have to come here."""
    shards = dict(trained.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            shard = shards[name].to(parameter.device)
            parameter.copy_(shard.full_tensor() if isinstance(shard, DTensor) else shard)
