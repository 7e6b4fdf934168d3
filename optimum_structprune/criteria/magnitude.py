"""Weight magnitude: the baseline that uses no text."""

from torch import Tensor

from ..calibration.moments import Moments
from .base import Criterion, per_unit, register_criterion


@register_criterion("magnitude")
class Magnitude(Criterion):
    """The score is ‖W_:u‖, the norm of the columns that consume the unit u."""

    def score(self, weight: Tensor, moments: Moments, columns_per_unit: int) -> Tensor:
        """See `Criterion.score`."""
        return per_unit(weight.square().sum(0), columns_per_unit).sqrt()
