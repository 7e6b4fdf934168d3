"""New values of the kept weights that make up for the removed ones. Tensors in, tensors out."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from ..calibration.moments import Moments
from ..errors import StructPruneError


logger = logging.getLogger(__name__)

# A second moment, relative to the mean one, below which a component counts as still.
LEAST = 1e-6

Refit = Callable[[Tensor, "Tensor | None", Moments, Tensor, float], "tuple[Tensor, Tensor | None]"]


def with_damped_factor(matrix: Tensor, damping: float, use: Callable[[Tensor], Tensor]) -> Tensor:
    """What `use` makes of the Cholesky factor of `matrix + λ D` for symmetric `matrix` with the diagonal D.

    The ridge is relative to every component's own second moment, so what is loud and what is quiet are held back
    alike: a share λ / (1 + λ) of every correlation is not believed, whatever the scale of the components. The
    factorisation is tried in fp32, then in fp64, then with ten times the damping, and so on, until the result is
    finite.

    Args:
        matrix: Positive semi-definite, shape `(n, n)`, not all zeros.
        damping: λ.
        use: Takes L with `L Lᵀ = matrix + λ D`, lower triangular, shape `(n, n)`.

    Raises:
        StructPruneError: If nothing helps.
    """
    diagonal = matrix.diagonal()
    own = diagonal.clamp(min=LEAST * float(diagonal.mean()))  # what never moves would leave nothing to divide by
    for attempt in range(6):
        ridge = max(damping, 1e-8) * 10.0**attempt
        for dtype in (torch.float32, torch.float64):
            damped = matrix.to(dtype, copy=True)
            damped.diagonal().add_(own.to(dtype), alpha=ridge)
            factor, info = torch.linalg.cholesky_ex(damped)
            if info == 0:
                result = use(factor)
                if torch.isfinite(result).all():
                    return result
        logger.warning("The Gram matrix is not positive definite with damping %g; trying ten times that.", ridge)
    raise StructPruneError(
        "The Gram matrix of a tap cannot be inverted even with damping; its activations are broken."
    )


def solve_damped(matrix: Tensor, right: Tensor, damping: float) -> Tensor:
    """Solve `X (matrix + λ D) = right`, with the ridge of `with_damped_factor`.

    Args:
        matrix: Positive semi-definite, shape `(n, n)`.
        right: Shape `(m, n)`.
        damping: λ.

    Returns:
        X, shape `(m, n)`, in the dtype of `right`; zeros for a matrix of zeros.
    """
    if float(matrix.diagonal().sum()) <= 0:
        return torch.zeros_like(right)
    return with_damped_factor(
        matrix, damping, lambda factor: torch.cholesky_solve(right.to(factor.dtype).T, factor).T.to(right.dtype)
    )


def no_refit(
    weight: Tensor, bias: Tensor | None, moments: Moments, keep: Tensor, damping: float
) -> tuple[Tensor, Tensor | None]:
    """The kept columns as they are."""
    return weight[:, keep], bias


def bias_refit(
    weight: Tensor, bias: Tensor | None, moments: Moments, keep: Tensor, damping: float
) -> tuple[Tensor, Tensor | None]:
    """The kept columns as they are, the mean output of the removed ones as a bias (FLAP, An et al. 2023, eq. 8)."""
    gone = _others(keep, weight.shape[1])
    shift = weight[:, gone] @ moments.mean[gone].to(weight)
    return weight[:, keep], shift if bias is None else bias + shift


def least_squares(
    weight: Tensor, bias: Tensor | None, moments: Moments, keep: Tensor, damping: float
) -> tuple[Tensor, Tensor | None]:
    """Kept weights that give the dense output with the least squared error.

    Minimises `E‖W x + e − W' x_S‖² + λ tr(ΔᵀΔ D)` with Δ = W' − W_S and D = diag(H_SS), where e is the error that the
    moments' error says to make up for, or nothing. The ridge pulls toward the original kept weights, so the solution
    is these plus what the kept components predict of the removed ones and of e:
    `W' = W_S + (W_R H_RS + E[e x_Sᵀ]) (H_SS + λ D)⁻¹`. With a bias the fit is affine: H is centred, and the bias takes
    what the means leave over.

    Args:
        weight: W, shape `(out, n)`.
        bias: Shape `(out,)`, or None.
        moments: Of the input x, with Gram matrix, for all n components.
        keep: Kept columns S, ascending.
        damping: λ.

    Returns:
        W', shape `(out, kept)`, and the bias.
    """
    gram = moments.full_gram()
    gone, error = _others(keep, weight.shape[1]), moments.error
    cross, square = gram[gone][:, keep], gram[keep][:, keep]
    mean = moments.mean.to(square)
    if bias is not None:
        cross = cross - torch.outer(mean[gone], mean[keep])
        square = square - torch.outer(mean[keep], mean[keep])
    missing = weight[:, gone] @ cross.to(weight)
    if error is not None:
        centre = 0.0 if bias is None else torch.outer(error.mean, mean[keep])
        missing = missing + (error.cross[:, keep] - centre).to(weight)
    refitted = weight[:, keep] + solve_damped(square, missing, damping)
    if bias is not None:
        bias = bias + weight @ mean.to(weight) - refitted @ mean[keep].to(weight)
        bias = bias if error is None else bias + error.mean.to(bias)
    return refitted, bias


def _others(keep: Tensor, size: int) -> Tensor:
    left = torch.ones(size, dtype=torch.bool, device=keep.device)
    left[keep] = False
    return left.nonzero().squeeze(1)


REFITS: dict[str, Refit] = {
    "none": no_refit,
    "bias": bias_refit,
    "least_squares": least_squares,
}
