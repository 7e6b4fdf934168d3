"""PIP: how differently the loss depends on a unit in two views of a text."""

from torch import Tensor

from ..calibration.gradients import contrasts
from ..calibration.moments import Moments
from .base import Criterion, per_unit, register_criterion


@register_criterion("pip")
class PerturbedViews(Criterion):
    """The score is E|g_j(sample) - g_j(perturbed sample)|, summed over the columns j of a unit.

    g_j is the gradient of the loss by a gate on x_j. PIP (Cao et al., Findings of EMNLP 2025, arXiv 2501.15278) prunes
    what struggles to distinguish two such views, in rounds of at most 5 %. Its formula, its perturbation and its unit
    were in no source at hand, so this is our interpretation; see `calibration.gradients.contrasts`.
    """

    needs_gradient = True
    watches = staticmethod(contrasts)
    views = 2

    def score(self, weight: Tensor, moments: Moments, columns_per_unit: int) -> Tensor:
        """See `Criterion.score`."""
        assert moments.saliency is not None
        return per_unit(moments.saliency.to(weight), columns_per_unit)
