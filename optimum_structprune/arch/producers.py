"""How strongly the weights of a model write each channel of a space, read off the weights alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .spec import CHANNEL, ArchSpec, Axis, Space


# The number of inputs of a matrix that are in memory a second time.
INPUTS = 1024


def producer_norms(model: nn.Module, arch: ArchSpec, space: Space) -> Tensor | None:
    """Σ_W √Σ_i W_ji² γ_i² of each channel j of a space, over the producers W that give it, shape `(units,)`.

    γ is the weight of the norm that a producer reads from, and 1 where the residual stream of the model is not
    described or there is no norm. It is how much the channel's inputs vary if the components of what a norm gives vary
    alike, so it needs no text. None where the units are no single channels, or no producer is a matrix.
    """
    axes = matrices(model, space.producers) if space.unit == CHANNEL else []
    norms = [norms_by_unit(model, space, axis, _norm_before(model, arch, space, axis).square()) for axis in axes]
    return torch.stack(norms).sum(0) if norms else None


@torch.no_grad()
def norms_by_unit(model: nn.Module, space: Space, axis: Axis, squares: Tensor) -> Tensor:
    """√Σ_i W_ji² E[x_i²] of the channels j of a space, summed over the rows of a channel. `squares` has the shape `(…,
    n)`, the result `(…, units)`, in the dtype and on the device of `squares`.
    """
    matrix = _matrix(model, axis)
    total = squares.new_zeros(*squares.shape[:-1], matrix.shape[1])
    for inputs, of_inputs in zip(matrix.split(INPUTS), squares.split(INPUTS, -1), strict=True):
        total += of_inputs @ inputs.to(squares).square()
    return total[..., axis.indices(range(space.size))].sqrt().unflatten(-1, (space.size, -1)).sum(-1)


def matrices(model: nn.Module, axes: Sequence[Axis]) -> list[Axis]:
    """Those of some axes that lie in matrices, and not in vectors such as biases."""
    return [axis for axis in axes if _matrix(model, axis).ndim == 2]


def _matrix(model: nn.Module, axis: Axis) -> Tensor:
    """The parameter of a producer, of one expert where the axis names one, with the units along its last dimension."""
    parameter, dim = model.get_parameter(axis.param).detach(), axis.dim
    if axis.part is not None:
        parameter, dim = parameter[axis.part], dim - 1
    return parameter.movedim(dim, -1)


def _norm_before(model: nn.Module, arch: ArchSpec, space: Space, axis: Axis) -> Tensor:
    """The weight of the norm that a producer reads from, or ones, shape `(n,)`, fp32."""
    for read in arch.residual.reads if arch.residual is not None else ():
        if read.norm and read.layer == space.layer and any(reader.param == axis.param for reader in read.readers):
            weight = getattr(model.get_submodule(read.tap), "weight", None)
            if weight is not None and arch.residual is not None:
                return weight.detach().float() + arch.residual.norm_offset
    matrix = _matrix(model, axis)
    return torch.ones(len(matrix), device=matrix.device)
