"""First-order Taylor: the change of the loss if a unit were zero."""

from torch import Tensor

from ..calibration.moments import Moments
from .base import Criterion, per_unit, register_criterion


@register_criterion("taylor")
class Taylor(Criterion):
    """The score is E|x_j · ∂L/∂x_j|, summed over the columns j of a unit.

    It is eq. 8 of Molchanov et al. (2019), and eq. 5 of LLM-Pruner (Ma et al. 2023) on activations.
    """

    needs_gradient = True

    def score(self, weight: Tensor, moments: Moments, columns_per_unit: int) -> Tensor:
        """See `Criterion.score`."""
        assert moments.saliency is not None
        return per_unit(moments.saliency.to(weight), columns_per_unit)
