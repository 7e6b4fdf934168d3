"""Magnitude: the norm of the weights, a baseline without calibration text."""

from __future__ import annotations

from torch import Tensor

from ..method.calibrate import Moments
from .registry import per_unit, register_criterion


@register_criterion("magnitude")
def magnitude(weight: Tensor, moments: Moments, columns_per_unit: int) -> Tensor:
    """Return ‖W_:u‖, the norm of the consumer's columns that read the unit u."""
    return per_unit(weight.square().sum(0), columns_per_unit).sqrt()
