"""Wanda in structured form: weight magnitude times activation norm."""

from torch import Tensor

from ..calibration.moments import Moments
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
