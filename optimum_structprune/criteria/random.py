"""Random scores: the baseline that every criterion has to beat."""

import torch
from torch import Tensor

from ..calibration.moments import Moments
from ..config.pruning import StructPruneConfig
from .base import Criterion, register_criterion


@register_criterion("random")
class Random(Criterion):
    """The scores are uniform random numbers from the config's seed."""

    def __init__(self, config: StructPruneConfig):
        super().__init__(config)
        self.generator = torch.Generator().manual_seed(config.seed)

    def score(self, weight: Tensor, moments: Moments, columns_per_unit: int) -> Tensor:
        """See `Criterion.score`."""
        return torch.rand(weight.shape[1] // columns_per_unit, generator=self.generator).to(weight)
