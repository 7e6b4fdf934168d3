"""Weights that read what a space numbers: how they are read and written."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..arch.spec import Axis


def read_consumer(model: nn.Module, axis: Axis) -> tuple[Tensor, Tensor | None]:
    """Weight `(out, n)` and bias `(out,)` of a consumer as fp32 copies, whichever way round it is stored."""
    weight, bias = _consumer(model, axis)
    return weight.to(torch.float32, copy=True), None if bias is None else bias.to(torch.float32, copy=True)


@torch.no_grad()
def write_consumer_(model: nn.Module, axis: Axis, keep: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Give a consumer refitted columns, and zeros where a column is removed: the layer then computes what the
    smaller layer will compute.

    Args:
        model: The model that is changed.
        axis: The consumer.
        keep: Kept columns.
        weight: Their new values, shape `(out, kept)`.
        bias: New bias, shape `(out,)`; None leaves the module without one.
    """
    columns, old = _consumer(model, axis)
    columns.zero_()
    columns[:, keep] = weight.to(columns)
    if bias is None:
        return
    if old is not None:
        old.copy_(bias)
    else:
        module = model.get_submodule(axis.module)
        trained = module.get_parameter(axis.param.rpartition(".")[2]).requires_grad
        module.bias = nn.Parameter(bias.to(columns), requires_grad=trained)


def _consumer(model: nn.Module, axis: Axis) -> tuple[Tensor, Tensor | None]:
    """Views of a consumer's weight, `(out, n)`, and bias: those of one expert where the axis names one."""
    module, leaf = model.get_submodule(axis.module), axis.param.rpartition(".")[2]
    weight = module.get_parameter(leaf).detach()
    bias = getattr(module, "bias" if axis.part is None else f"{leaf}_bias", None)
    bias = None if bias is None else bias.detach()
    if axis.part is None:
        return weight.movedim(axis.dim, -1), bias
    return weight[axis.part].movedim(axis.dim - 1, -1), None if bias is None else bias[axis.part]


def units_to_columns(keep: Sequence[int], axis: Axis, device: torch.device) -> Tensor:
    """Kept columns of a consumer, from kept units."""
    return torch.tensor(axis.indices(keep), device=device)
