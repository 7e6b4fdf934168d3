"""Iterative channel contribution: units go one sample after the other, those with the least effect first."""

from torch import Tensor

from ..calibration.moments import Moments
from .base import Criterion, per_unit, register_criterion
from .whole import removal_orders


@register_criterion("iterative_norm")
class IterativeNorm(Criterion):
    """The score is the place of a unit in the order in which units are removed.

    Those go first whose removal changes the output least, by the mean of ‖r_t + W_u x_tu‖ over tokens t, where r_t is
    what the units removed before have given. This is `IterativeChannelContributionHook` of NVIDIA's Model Optimizer
    0.47 (`modelopt/torch/nas/plugins/megatron_hooks/base_hooks.py`) without its optional scaling of the dense output,
    one sample after the other; see `calibration.whole.removal_orders`. There the units are channels; for KV groups the
    formula is ours.
    """

    watches = staticmethod(removal_orders)

    def score(self, weight: Tensor, moments: Moments, columns_per_unit: int) -> Tensor:
        """See `Criterion.score`."""
        assert moments.saliency is not None
        return per_unit(moments.saliency.to(weight), columns_per_unit) / columns_per_unit
