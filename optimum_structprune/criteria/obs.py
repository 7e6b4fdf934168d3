"""ZipLM: Inference-Aware Structured Pruning of Language Models, https://arxiv.org/abs/2302.04089."""

from __future__ import annotations

import torch
from torch import Tensor

from ..method.calibrate import Moments
from ..method.refit import ridge_strength, with_damped_factor
from .registry import register_criterion


@register_criterion(
    "obs", paper="ZipLM, Kurtic et al. 2023, arXiv:2302.04089", needs_gram=True, parameters=("damping",)
)
def obs(weight: Tensor, moments: Moments, columns_per_unit: int, *, damping: float) -> Tensor:
    """Return ½ tr(W_u [H⁻¹]_uu⁻¹ W_uᵀ) for each unit u, with H = E[x xᵀ].

    This is the output error that remains after the best refit of all other columns, equation 2 of ZipLM. For a single
    column j it is ½ ‖W_:j‖² / [H⁻¹]_jj.

    Deviation: H is damped as in the refit. ZipLM removes one structure at a time and updates H⁻¹ after each. Here all
    units are scored at once.
    """
    gram = moments.full_gram()
    diagonal = gram.diagonal()
    if float(diagonal.sum()) <= 0:
        return weight.new_zeros(len(gram) // columns_per_unit)

    def damped_copy(dtype: torch.dtype) -> Tensor:
        return gram.to(weight.device, dtype, copy=True)

    def losses(factor: Tensor) -> Tensor:
        return _losses(weight, factor, columns_per_unit)

    ridge = ridge_strength(float(damping), len(gram), moments.count)
    return with_damped_factor(damped_copy, diagonal, ridge, losses)


def _losses(weight: Tensor, factor: Tensor, columns_per_unit: int) -> Tensor:
    """Return ½ tr(W_u [H⁻¹]_uu⁻¹ W_uᵀ) of each unit u, `(units,)`, from the Cholesky factor of H, `(n, n)`.

    The factor is overwritten with H⁻¹. A unit whose block of H⁻¹ is indefinite by rounding gets NaN.
    """
    inverse = torch.cholesky_inverse(factor, out=factor)
    if columns_per_unit == 1:
        # The general case would factor many 1 x 1 matrices, which several threads make very slow.
        squares = weight.double().square().sum(0)
        return (0.5 * squares / inverse.diagonal().double()).to(weight)

    units = weight.shape[1] // columns_per_unit
    # Shape (units, columns_per_unit, columns_per_unit) for the blocks of H⁻¹.
    by_unit = inverse.view(units, columns_per_unit, units, columns_per_unit)
    blocks = by_unit.diagonal(dim1=0, dim2=2).movedim(-1, 0).double()
    # Shape (units, columns_per_unit, out) for the weight.
    columns = weight.reshape(-1, units, columns_per_unit).movedim(0, -1).double()

    # The batched LU of torch 2.13's CPU build fails from 160 columns on once several threads are set.
    factors, failed = torch.linalg.cholesky_ex(blocks)
    solutions = torch.linalg.solve_triangular(factors, columns, upper=False)
    losses = 0.5 * solutions.square().sum((1, 2))
    return losses.where(failed == 0, torch.nan).to(weight)
