"""FLAP: Fluctuation-based Adaptive Structured Pruning for Large Language Models, https://arxiv.org/abs/2312.11983."""

from __future__ import annotations

from torch import Tensor

from ..method.calibrate import Moments
from .registry import per_unit, register_criterion


@register_criterion("flap", paper="An et al. 2023, arXiv:2312.11983")
def flap(weight: Tensor, moments: Moments, columns_per_unit: int) -> Tensor:
    """Return Σ_j Var[x_j] · ‖W_:j‖² for each unit, summed over its columns j.

    This is equation 5 of FLAP.

    Deviation: FLAP standardizes the scores to compare them across layers. Here they rank the units of one layer.
    """
    fluctuations = moments.variance.to(weight) * weight.square().sum(0)
    return per_unit(fluctuations, columns_per_unit)
