"""Optimal Brain Surgeon: the error that remains after the best refit of the other columns."""

import torch
from torch import Tensor

from ..calibration.moments import Moments
from ..errors import StructPruneError
from ..surgery.refit import with_damped_factor
from .base import Criterion, register_criterion


@register_criterion("obs")
class OptimalBrainSurgeon(Criterion):
    """The score is ½ tr(W_u [H⁻¹]_uu⁻¹ W_uᵀ) for a unit u, which is ½ ‖W_:j‖² / [H⁻¹]_jj for a single column j.

    It is eq. 2 of ZipLM (Kurtic et al. 2023), with H = E[x xᵀ] damped as in the refit.
    """

    needs_gram = True

    def score(self, weight: Tensor, moments: Moments, columns_per_unit: int) -> Tensor:
        """See `Criterion.score`."""
        gram = moments.full_gram().to(weight)
        units = len(gram) // columns_per_unit
        if float(gram.diagonal().sum()) <= 0:
            return weight.new_zeros(units)
        inverse = with_damped_factor(gram, float(self.config.damping), torch.cholesky_inverse)
        tiles = (
            inverse.reshape(units, columns_per_unit, units, columns_per_unit)
            .diagonal(dim1=0, dim2=2)
            .permute(2, 0, 1)
            .double()
        )
        # Shape (units, columns_per_unit, out).
        columns = weight.reshape(len(weight), units, columns_per_unit).permute(1, 2, 0).double()
        # The batched LU of torch 2.13's CPU build fails from 160 columns on once several threads are set.
        solution = torch.linalg.solve_triangular(_factors(tiles), columns, upper=False)
        return 0.5 * solution.square().sum((1, 2)).to(weight)


def _factors(tiles: Tensor) -> Tensor:
    """The lower Cholesky factors of positive definite matrices, shape `(units, n, n)`.

    Where rounding has made a matrix indefinite, all get a ridge relative to their diagonals, as small as possible.
    """
    diagonal = torch.diag_embed(tiles.diagonal(dim1=1, dim2=2))
    for ridge in (0.0, *(10.0**power for power in range(-8, 1))):
        factors, info = torch.linalg.cholesky_ex(tiles + ridge * diagonal)
        if not info.any():
            return factors
    raise StructPruneError("The inverse of a Gram matrix has no positive diagonal; the activations are broken.")
