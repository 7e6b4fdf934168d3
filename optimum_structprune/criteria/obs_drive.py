"""The loss of `obs` together with a producer norm, as in SlimLLM, https://arxiv.org/abs/2505.22689."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..arch.spec import CHANNEL, ArchSpec, Axis, Space
from ..method.calibrate import Moments
from .obs import obs
from .registry import register_criterion


def producer_norms(model: nn.Module, arch: ArchSpec, space: Space) -> Tensor | None:
    """Return Σ_W √Σ_i W_ji² γ_i² of each channel j of a space, summed over its producers W, shape `(units,)`.

    γ is the weight of the norm before a producer. It is 1 if the model has no such norm, or if its residual stream is
    not described. The result is the standard deviation of the channel's input for independent components of the
    norm's output, so it needs no text.

    The result is None if the units are not single channels, or if no producer is a matrix.
    """
    if space.unit != CHANNEL:
        return None

    norms = []
    for axis in space.producers:
        if _matrix(model, axis).ndim == 2:
            squares = _norm_before(model, arch, space, axis).square()
            norms.append(norms_by_unit(model, space, axis, squares))

    if not norms:
        return None
    return torch.stack(norms).sum(0)


@torch.no_grad()
def norms_by_unit(model: nn.Module, space: Space, axis: Axis, squares: Tensor) -> Tensor:
    """Return √Σ_i W_ji² E[x_i²] of each channel j of a space, summed over the rows of the channel.

    Args:
        model: The model.
        space: The space.
        axis: The axis of one producer W.
        squares: E[x_i²], shape `(…, n)`.

    Returns:
        Shape `(…, units)`, in the dtype and on the device of `squares`.
    """
    energies = squares @ _matrix(model, axis).to(squares).square()
    rows = axis.indices(range(space.size))
    return energies[..., rows].sqrt().unflatten(-1, (space.size, -1)).sum(-1)


def _matrix(model: nn.Module, axis: Axis) -> Tensor:
    """Return the parameter of a producer, with the units along its last dimension.

    If the axis names an expert, the result is the matrix of this expert.
    """
    parameter = model.get_parameter(axis.param).detach()
    if axis.part is None:
        return parameter.movedim(axis.dim, -1)
    return parameter[axis.part].movedim(axis.dim - 1, -1)


def _norm_before(model: nn.Module, arch: ArchSpec, space: Space, axis: Axis) -> Tensor:
    """Return the weight of the norm before a producer, or ones, shape `(n,)`, fp32."""
    if arch.residual is not None:
        for place in arch.residual.reads:
            has_reader = any(reader.param == axis.param for reader in place.readers)
            if place.norm and place.layer == space.layer and has_reader:
                weight = getattr(model.get_submodule(place.tap), "weight", None)
                if weight is not None:
                    return weight.detach().float() + arch.residual.norm_offset

    matrix = _matrix(model, axis)
    return torch.ones(len(matrix), device=matrix.device)


@register_criterion(
    "obs_drive",
    paper="SlimLLM, Guo et al. 2025, arXiv:2505.22689",
    needs_gram=True,
    prior=producer_norms,
    parameters=("damping",),
)
def obs_drive(weight: Tensor, moments: Moments, columns_per_unit: int, *, damping: float) -> Tensor:
    """Return (√o_j + d_j · mean(√o) / mean(d))² / 4 for each channel j.

    o_j is the score of `obs`, d_j the norm of `producer_norms`, and the means are over the channels. A channel with a
    large norm can be active on other text although it was not on the calibration text, so its score is raised.

    Deviation: SlimLLM adds a similar term to a score of its own. Units of several columns are scored by `obs` alone.
    """
    losses = obs.score(weight, moments, columns_per_unit, damping=damping)
    if moments.prior is None or columns_per_unit > 1:
        return losses

    norms = moments.prior.to(losses)
    roots = losses.clamp(min=0).sqrt()
    scale = roots.mean() / norms.mean().clamp(min=torch.finfo(norms.dtype).tiny)
    return (roots + norms * scale).square() / 4
