"""Weights that give what a space numbers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..arch.spec import CHANNEL, ArchSpec, Axis, Space


# The number of rows of a matrix that are in memory in fp32 at a time.
ROWS = 1024


@torch.no_grad()
def drive(model: nn.Module, arch: ArchSpec, space: Space) -> Tensor | None:
    """How strongly each channel of a space is driven: Σ_W √Σ_i W_ji² γ_i² over its producers W, shape `(units,)`.

    γ is the weight of the norm that a producer reads from, and 1 where the residual stream of the model is not
    described or there is no norm. It is how much the channel's inputs vary if the components of what a norm gives vary
    alike, so it needs no text.

    Args:
        model: The model, with the layer of the space in memory.
        arch: Its description.
        space: The space.

    Returns:
        In fp32; None where the units are no single channels, or no producer is a matrix.
    """
    matrices = {axis: _matrix(model, axis) for axis in space.out} if space.unit == CHANNEL else {}
    norms = _norms(model, arch)
    driven = [
        _row_norms(matrix, norms.get(axis.param))[axis.indices(range(space.size))].view(space.size, -1).sum(1)
        for axis, matrix in matrices.items()
        if matrix.ndim > 1
    ]
    return torch.stack(driven).sum(0) if driven else None


def _matrix(model: nn.Module, axis: Axis) -> Tensor:
    """The parameter of a producer, of one expert where the axis names one, with the units along its last dimension."""
    parameter, dim = model.get_parameter(axis.param).detach(), axis.dim
    if axis.part is not None:
        parameter, dim = parameter[axis.part], dim - 1
    return parameter.movedim(dim, -1)


def _norms(model: nn.Module, arch: ArchSpec) -> dict[str, Tensor]:
    """The weight of the norm that each parameter reads from, by the parameter's name."""
    if arch.residual is None:
        return {}
    found: dict[str, Tensor] = {}
    for read in arch.residual.reads:
        weight = getattr(model.get_submodule(read.tap), "weight", None) if read.norm else None
        if weight is not None:
            found |= {reader.param: weight.detach().float() + arch.residual.plus for reader in read.readers}
    return found


def _row_norms(matrix: Tensor, scale: Tensor | None) -> Tensor:
    """√Σ_i m_ij² s_i² of each column j of a matrix, in fp32."""
    total = torch.zeros(matrix.shape[1], device=matrix.device)
    scales = torch.ones(len(matrix)) if scale is None else scale
    for rows, of_rows in zip(matrix.split(ROWS), scales.to(matrix.device).split(ROWS), strict=True):
        total += (rows.float() * of_rows[:, None]).square_().sum(0)
    return total.sqrt_()
