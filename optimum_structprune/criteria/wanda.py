"""Wanda in structured form: weight magnitude times activation norm."""

from torch import Tensor

from ..calibration.moments import Moments
from .base import Criterion, per_unit, register_criterion


@register_criterion("wanda")
class Wanda(Criterion):
    """‖W_:j‖ · √E[x_j²], as energy summed over the columns of a unit (Sun et al. 2023, eq. 1, per column)."""

    def score(self, weight: Tensor, moments: Moments, columns_per_unit: int) -> Tensor:
        """See `Criterion.score`."""
        energy = weight.square().sum(0) * moments.square.to(weight)
        return per_unit(energy, columns_per_unit).sqrt()
