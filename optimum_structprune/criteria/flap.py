"""FLAP: how much a unit fluctuates, since a constant could be replaced by a bias."""

from torch import Tensor

from ..calibration.moments import Moments
from .base import Criterion, per_unit, register_criterion


@register_criterion("flap")
class Flap(Criterion):
    """Var[x_j] · ‖W_:j‖², summed over the columns of a unit (An et al. 2023, eq. 5)."""

    def score(self, weight: Tensor, moments: Moments, columns_per_unit: int) -> Tensor:
        """See `Criterion.score`."""
        return per_unit(moments.variance.to(weight) * weight.square().sum(0), columns_per_unit)
