"""Random scores, a baseline for all other criteria."""

from __future__ import annotations

import torch
from torch import Tensor

from ..method.calibrate import Moments
from .registry import register_criterion


@register_criterion("random", parameters=("seed",))
def random(weight: Tensor, moments: Moments, columns_per_unit: int, *, seed: int) -> Tensor:
    """Return uniform random scores, drawn on the CPU so that they do not depend on the device."""
    generator = torch.Generator().manual_seed(seed)
    num_units = weight.shape[1] // columns_per_unit
    return torch.rand(num_units, generator=generator).to(weight)
