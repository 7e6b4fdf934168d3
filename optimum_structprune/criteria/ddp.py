"""DDP: gates that are learned while the predictions of the dense model are kept."""

from torch import Tensor

from ..calibration.moments import Moments
from .base import Criterion, per_unit, register_criterion


@register_criterion("ddp")
class LearnedGates(Criterion):
    """The score of a unit is its gate z, learned as in Deterministic Differentiable Pruning (Huang et al., ICML 2026,
    arXiv 2603.08065); see `pruning.gates`.

    A gate also scales: with `refit="none"` the columns of a kept unit are multiplied by max(z, 0), as that paper's
    code does when it folds gates into weights. Every other refit starts from the dense weights.
    """

    learned = True

    def score(self, weight: Tensor, moments: Moments, columns_per_unit: int) -> Tensor:
        """See `Criterion.score`."""
        assert moments.saliency is not None
        return per_unit(moments.saliency.to(weight), columns_per_unit) / columns_per_unit

    def unfitted(self, weight: Tensor, moments: Moments) -> Tensor:
        """See `Criterion.unfitted`."""
        assert moments.saliency is not None
        return weight * moments.saliency.to(weight).clamp(min=0)
