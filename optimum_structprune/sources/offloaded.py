"""Brings in the weights of one layer at a time, wherever accelerate keeps those of the others.

Pruning calls a layer once for each batch, so an offloaded layer comes in once and stays until it is finished with;
whatever shape it has by then goes back.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from ..arch.load import ModelInfo, describe
from ..arch.meta import meta_model
from ..arch.modules import layer_list
from ..arch.spec import HIDDEN, VOCAB, ArchSpec, Widths
from ..config.pruning import StructPruneConfig
from ..criteria import CRITERIA
from ..errors import StructPruneError
from ..forward.metrics import evaluating
from ..method.layers import Batch, InMemory, NotSequentialError
from ..system.offloading import bring_in, compute_device, put_back
from ..system.stages import give_back_free_memory


def layer_device_map(
    config: PretrainedConfig,
    device: str = "cpu",
    layers: str = "disk",
    arch_file: str | Path | None = None,
    trust_remote_code: bool = False,
) -> dict[str, str]:
    """Build a `device_map` for `from_pretrained` that puts the layers elsewhere than everything around them.

    Args:
        config: The config of the model.
        device: The device that computes, and that holds what is no layer: embeddings, the last norm, the head.
        layers: Where the layers are while they do not run: `disk`, or `cpu` for its memory.
        arch_file: A file with descriptions of your own; see `arch/families`.
        trust_remote_code: Whether code that comes with the model may run.

    Raises:
        StructPruneError: If the model type is unknown, or transformers cannot build the model.
    """
    model = meta_model(config, arch_file, trust_remote_code=trust_remote_code)
    lists = {path for path, _ in describe(model, arch_file).stacks}

    def walk(name: str, module: nn.Module) -> Iterator[tuple[str, str]]:
        if name in lists:
            yield name, layers
        elif not any(path.startswith(f"{name}." if name else "") for path in lists):
            yield name, device
        else:
            tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
            for leaf, child in [*tensors, *module.named_children()]:
                path = f"{name}.{leaf}" if name else leaf
                yield from walk(path, child) if isinstance(child, nn.Module) else [(path, device)]

    return dict(walk("", model))


class Offloaded(InMemory):
    """Runs layers that accelerate keeps elsewhere; the hidden states of the samples are in the CPU's memory."""

    keep_on = torch.device("cpu")

    def __init__(self, model: PreTrainedModel, arch: ArchSpec, *more: Any):
        try:
            super().__init__(model, arch, *more)
        except NotSequentialError as error:
            advice = f"load the {arch.model_type} model in memory, or over several devices"
            reason = f"{error}, so the layers cannot be brought in one by one"
            raise StructPruneError(f"{reason}; {advice}.") from error

    @property
    def device(self) -> torch.device:
        return compute_device(self.model)

    @contextmanager
    def at(self, layer: int, changes: bool = False) -> Iterator[None]:
        finished, hooks = False, []
        try:
            hooks = bring_in(layer_list(self.model, self.arch)[layer])
            yield
            finished = True
        finally:
            put_back(self.model, layer_list(self.model, self.arch)[layer], hooks, store=changes and finished)
        give_back_free_memory()


def check_offloaded(config: StructPruneConfig, described: ModelInfo, widths: Widths) -> None:
    """Refuse what takes all weights of an offloaded model at once."""
    name, advice = described.name, "load the model in memory, or over several devices"
    if described.quantized:
        raise StructPruneError(f"{name} is offloaded and quantized, and is unpacked in memory; {advice}.")
    if CRITERIA.get(config.scored_by).whole_model_statistics is not None:
        reason = f"{name} is offloaded, and criterion={config.scored_by!r} takes all its layers at once"
        raise StructPruneError(f"{reason}; choose criterion='obs' or 'wanda', or {advice}.")
    if space := next((space for space in (HIDDEN, VOCAB) if space in widths), None):
        reason = f"{name} is offloaded, and {space!r} changes weights all over it at once"
        raise StructPruneError(f"{reason}; prune inside the layers, or {advice}.")


def check_sequential(model: PreTrainedModel, arch: ArchSpec) -> None:
    """Refuse an offloaded model whose layers cannot run one by one."""
    if model.main_input_name != "input_ids":
        return
    texts = [torch.tensor([row]) for row in ((0, 1, 2, 3), (3, 2, 1, 0))]
    with evaluating(model):
        Offloaded(model, arch, [Batch(0, ids) for ids in texts])
