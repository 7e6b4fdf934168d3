"""The state of an optimizer, which follows its model when that shrinks."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..arch.spec import ArchSpec
from ..errors import StructPruneError
from .cut import slice_tensors
from .plan import Plan


@torch.no_grad()
def slice_state_(optimizer: Optimizer, model: nn.Module, arch: ArchSpec, plan: Plan) -> None:
    """Cut an optimizer's state down with its parameters, so that every kept weight keeps its state."""
    states = {name: optimizer.state[p] for name, p in model.named_parameters() if p in optimizer.state}
    for key in {key for state in states.values() for key in state}:
        tensors = {name: state[key] for name, state in states.items() if isinstance(state.get(key), Tensor)}
        for name, tensor in slice_tensors({n: t for n, t in tensors.items() if t.ndim}, arch.spaces, plan).items():
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
