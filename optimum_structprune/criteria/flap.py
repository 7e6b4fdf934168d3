"""FLAP: how much a unit fluctuates, since a bias could replace a unit that is constant."""

from torch import Tensor

from ..calibration.moments import Moments
from .base import Criterion, per_unit, register_criterion


@register_criterion("flap")
class Flap(Criterion):
    """The score is Var[x_j] · ‖W_:j‖², summed over the columns j of a unit (FLAP, An et al. 2023, eq. 5)."""

    def score(self, weight: Tensor, moments: Moments, columns_per_unit: int) -> Tensor:
        """See `Criterion.score`."""
        return per_unit(moments.variance.to(weight) * weight.square().sum(0), columns_per_unit)
