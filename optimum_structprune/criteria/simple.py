"""Criteria of a few lines: Wanda, FLAP, weight magnitude, and random scores."""

import torch
from torch import Tensor

from ..calibration.moments import Moments
from ..config.pruning import StructPruneConfig
from .base import Criterion, per_unit, register_criterion


@register_criterion("wanda")
class Wanda(Criterion):
    """The score is √(Σ_j ‖W_:j‖² · E[x_j²]) over the columns j of a unit.

    For one column it is ‖W_:j‖ · √E[x_j²], eq. 1 of Wanda (Sun et al. 2023) per column.
    """

    def score(self, weight: Tensor, moments: Moments, columns_per_unit: int) -> Tensor:
        """See `Criterion.score`."""
        energy = weight.square().sum(0) * moments.square.to(weight)
        return per_unit(energy, columns_per_unit).sqrt()


@register_criterion("flap")
class Flap(Criterion):
    """The score is Var[x_j] · ‖W_:j‖², summed over the columns j of a unit (FLAP, An et al. 2023, eq. 5)."""

    def score(self, weight: Tensor, moments: Moments, columns_per_unit: int) -> Tensor:
        """See `Criterion.score`."""
        return per_unit(moments.variance.to(weight) * weight.square().sum(0), columns_per_unit)


@register_criterion("magnitude")
class Magnitude(Criterion):
    """The score is ‖W_:u‖, the norm of the columns that consume the unit u."""

    def score(self, weight: Tensor, moments: Moments, columns_per_unit: int) -> Tensor:
        """See `Criterion.score`."""
        return per_unit(weight.square().sum(0), columns_per_unit).sqrt()


@register_criterion("random")
class Random(Criterion):
    """The scores are uniform random numbers from the config's seed."""

    def __init__(self, config: StructPruneConfig):
        super().__init__(config)
        self.generator = torch.Generator().manual_seed(config.seed)

    def score(self, weight: Tensor, moments: Moments, columns_per_unit: int) -> Tensor:
        """See `Criterion.score`."""
        return torch.rand(weight.shape[1] // columns_per_unit, generator=self.generator).to(weight)
