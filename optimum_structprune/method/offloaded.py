"""Compute activations of models that accelerate has offloaded. Only one layer at a time is in memory.

Pruning runs a layer once for each batch, so a layer is loaded once and remains in memory until it is pruned. Its new
weights then replace the offloaded weights, also with another shape.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from ..arch.inference import evaluating
from ..arch.load import describe
from ..arch.meta import meta_model
from ..arch.modules import layer_list
from ..arch.spec import ArchSpec
from ..system.errors import StructPruneError
from ..system.offloading import bring_in, put_back
from ..system.stages import give_back_free_memory
from .layers import Batch, InMemory, NotSequentialError


def layer_device_map(
    config: PretrainedConfig,
    device: str = "cpu",
    layers: str = "disk",
    arch_file: str | Path | None = None,
    trust_remote_code: bool = False,
) -> dict[str, str]:
    """Return a `device_map` for `from_pretrained` that offloads the layers, and nothing else.

    Args:
        config: The config of the model.
        device: The device that computes. It holds all modules around the layers: embeddings, the last norm, the head.
        layers: The place of layers that do not run: "disk", or "cpu" for its memory.
        arch_file: A file with your own descriptions of architectures; see `arch/families`.
        trust_remote_code: Whether code that comes with the model may run.

    Raises:
        StructPruneError: If the model type is unknown, or transformers cannot build the model.
    """
    model = meta_model(config, arch_file, trust_remote_code=trust_remote_code)
    stacks = {path for path, _ in describe(model, arch_file).stacks}
    device_map: dict[str, str] = {}

    def add_entries(prefix: str, module: nn.Module) -> None:
        name = prefix.removesuffix(".")
        if name in stacks:
            device_map[name] = layers
            return
        if not any(path.startswith(prefix) for path in stacks):
            device_map[name] = device
            return

        # The module contains layers, so it is divided into its parts.
        for attribute, _ in module.named_parameters(recurse=False):
            device_map[f"{prefix}{attribute}"] = device
        for attribute, _ in module.named_buffers(recurse=False):
            device_map[f"{prefix}{attribute}"] = device
        for child_name, child in module.named_children():
            add_entries(f"{prefix}{child_name}.", child)

    add_entries("", model)
    return device_map


class Offloaded(InMemory):
    """A source that loads each offloaded layer before it runs. The hidden states of the samples are in CPU memory.

    The arguments are the same as for `InMemory`.

    Raises:
        StructPruneError: If the layers pass on more than hidden states.
    """

    keep_on = torch.device("cpu")

    def __init__(
        self,
        model: PreTrainedModel,
        arch: ArchSpec,
        batches: Sequence[Batch],
        error_feedback: float = 0.0,
        fixed: bool = False,
    ):
        try:
            super().__init__(model, arch, batches, error_feedback, fixed)
        except NotSequentialError as error:
            raise StructPruneError(
                f"{error}, so the layers cannot be loaded one by one. Load the {arch.model_type} model in memory, "
                "or over several devices."
            ) from error

    @contextmanager
    def at(self, layer: int, changes: bool = False) -> Iterator[None]:
        """Load a layer inside `with`. With `changes`, its new weights replace the offloaded weights."""
        is_finished = False
        hooks: list[Any] = []
        try:
            hooks = bring_in(layer_list(self.model, self.arch)[layer])
            yield
            is_finished = True
        finally:
            # The layer may have been replaced, so it is looked up again.
            put_back(self.model, layer_list(self.model, self.arch)[layer], hooks, store=changes and is_finished)
        give_back_free_memory()


def check_sequential(model: PreTrainedModel, arch: ArchSpec) -> None:
    """Raise `StructPruneError` if the layers of an offloaded model cannot run one by one."""
    if model.main_input_name != "input_ids":
        return

    # `Offloaded` compares the arguments of the layers between two batches.
    ids = torch.arange(4)[None]
    with evaluating(model):
        Offloaded(model, arch, [Batch(0, ids), Batch(0, ids.flip(1))])
