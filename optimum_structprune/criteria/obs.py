"""Optimal Brain Surgeon: the error that is left after the best refit of the other columns."""

import torch
from torch import Tensor

from ..calibration.stats import Moments
from ..refit import with_damped_factor
from .base import Criterion, register_criterion


@register_criterion("obs")
class OptimalBrainSurgeon(Criterion):
    """½ tr(W_u [H⁻¹]_uu⁻¹ W_uᵀ) for a unit u, which is ½ ‖W_:j‖² / [H⁻¹]_jj for one column.

    ZipLM (Kurtic et al. 2023), eq. 2. H has the damping of the refit.
    """

    needs_gram = True

    def score(self, weight: Tensor, moments: Moments, block: int) -> Tensor:
        """See `Criterion.score`."""
        gram = moments.full_gram().to(weight)
        units = len(gram) // block
        if float(gram.diagonal().sum()) <= 0:
            return weight.new_zeros(units)
        inverse = with_damped_factor(gram, float(self.config.damping), torch.cholesky_inverse)
        tiles = inverse.reshape(units, block, units, block).diagonal(dim1=0, dim2=2).permute(2, 0, 1).double()
        columns = weight.reshape(len(weight), units, block).permute(1, 2, 0).double()  # (unit, block, out)
        return 0.5 * (columns * torch.linalg.solve(tiles, columns)).sum((1, 2)).to(weight)
