"""Wanda: A Simple and Effective Pruning Approach for Large Language Models, https://arxiv.org/abs/2306.11695."""

from __future__ import annotations

from torch import Tensor

from ..method.calibrate import Moments
from .registry import per_unit, register_criterion


@register_criterion("wanda", paper="Sun et al. 2023, arXiv:2306.11695")
def wanda(weight: Tensor, moments: Moments, columns_per_unit: int) -> Tensor:
    """Return √(Σ_j ‖W_:j‖² · E[x_j²]) for each unit, summed over its columns j.

    Equation 1 of Wanda scores a single weight by |W_ij| · ‖x_j‖.

    Deviation: a whole column is scored, by the root of the sum of the squared scores of its weights. For one column
    this is ‖W_:j‖ · √E[x_j²].
    """
    column_energies = weight.square().sum(0) * moments.square.to(weight)
    return per_unit(column_energies, columns_per_unit).sqrt()
