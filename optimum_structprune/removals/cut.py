"""Whole models cut down to what is kept, and the state of their optimizers with them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PretrainedConfig, PreTrainedModel

from ..arch.meta import skeleton
from ..arch.modules import adopt_config_, layer_list, put_layers_, replace_
from ..arch.shrink import shrunk_config
from ..arch.spec import LAYER, ArchSpec
from ..errors import StructPruneError
from ..method.shrink import fill_layer_, slice_tensors, tensors_under
from ..record.plan import Plan


@contextmanager
def rebuilding_(model: PreTrainedModel, config: PretrainedConfig, buffers: bool = False) -> Iterator[PreTrainedModel]:
    """Give a model another config; inside `with`, modules of the skeleton that it gives are put into the model."""
    new = skeleton(model, config, buffers)
    yield new
    adopt_config_(model, new)


def replace_layers_(
    model: PreTrainedModel, arch: ArchSpec, other: PreTrainedModel, state: Mapping[str, Tensor]
) -> None:
    """Replace all layers of a model by those of a skeleton."""
    for layer in range(arch.num_layers):
        fill_layer_(model, arch, layer, tensors_under(state, arch.layer_prefix(layer)), other)


@torch.no_grad()
def drop_layers_(model: PreTrainedModel, arch: ArchSpec, keep: Sequence[int]) -> None:
    """Remove whole layers, and build those that stay anew, with the indices that the shorter config gives them."""
    config = shrunk_config(model.config, arch, {LAYER: len(keep)}, stay=keep)
    with rebuilding_(model, config) as shorter:
        old, new = layer_list(model, arch), layer_list(shorter, arch)
        for index, layer in zip(keep, new, strict=True):
            replace_(old[index], layer, old[index].state_dict(), arch)
        put_layers_(model, arch, new)


@torch.no_grad()
def slice_state_(optimizer: Optimizer, model: nn.Module, arch: ArchSpec, plan: Plan) -> None:
    """Cut an optimizer's state down with its parameters, so that every kept weight keeps its state."""
    states = {name: optimizer.state[p] for name, p in model.named_parameters() if p in optimizer.state}
    for key in {key for state in states.values() for key in state}:
        tensors = {name: state[key] for name, state in states.items() if isinstance(state.get(key), Tensor)}
        for name, tensor in slice_tensors(
            {n: t for n, t in tensors.items() if t.ndim}, arch.spaces, plan.keep
        ).items():
            states[name][key] = tensor


def check_state(optimizer: Optimizer) -> None:
    """Refuse an optimizer whose state does not belong to single weights."""
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, Tensor) and value.ndim and value.shape != parameter.shape:
                raise StructPruneError(
                    f"{type(optimizer).__name__} keeps {key!r} of shape {tuple(value.shape)} for a parameter of shape "
                    f"{tuple(parameter.shape)}, which cannot be cut with it; use optim='adamw_torch'."
                )
