"""New values of the kept weights that make up for the removed ones. Tensors in, tensors out."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from ..calibration.moments import Moments
from ..errors import StructPruneError


logger = logging.getLogger(__name__)

# The smallest second moment, relative to the mean one, that the ridge of a component is computed from.
LEAST = 1e-6

Refit = Callable[[Tensor, "Tensor | None", Moments, Tensor, float], "tuple[Tensor, Tensor | None]"]


def with_damped_factor(matrix: Tensor, damping: float, use: Callable[[Tensor], Tensor]) -> Tensor:
    """The result of `use` for the Cholesky factor of `matrix + λ D`, where D is the diagonal of `matrix`.

    The ridge is relative to every component's own second moment, so that it does not depend on the scale of a
    component: every correlation is lowered by the factor 1 / (1 + λ). The factorisation is tried in fp32, then in
    fp64, then with ten times the damping, and so on, until the result is finite.

    Args:
        matrix: A positive semi-definite matrix, shape `(n, n)`, not all zeros.
        damping: λ.
        use: A function of the lower triangular L with `L Lᵀ = matrix + λ D`, shape `(n, n)`.

    Raises:
        StructPruneError: If the result is not finite even with 100,000 times the damping.
    """
    diagonal = matrix.diagonal()
    # A component that is always zero would get no ridge, and the matrix would stay singular.
    scale = diagonal.clamp(min=LEAST * float(diagonal.mean()))
    for attempt in range(6):
        ridge = max(damping, 1e-8) * 10.0**attempt
        for dtype in (torch.float32, torch.float64):
            damped = matrix.to(dtype, copy=True)
            damped.diagonal().add_(scale.to(dtype), alpha=ridge)
            factor, info = torch.linalg.cholesky_ex(damped)
            if info == 0:
                result = use(factor)
                if torch.isfinite(result).all():
                    return result
        logger.warning("The Gram matrix is not positive definite with damping %g; trying ten times that.", ridge)
    raise StructPruneError(
        "The Gram matrix of a consumer's input cannot be inverted even with damping; the activations are broken."
    )


def solve_damped(matrix: Tensor, right: Tensor, damping: float) -> Tensor:
    """Solve `X (matrix + λ D) = right`, with the ridge of `with_damped_factor`.

    Args:
        matrix: A positive semi-definite matrix, shape `(n, n)`.
        right: The right side, shape `(m, n)`.
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
    """Leave the kept columns as they are; see `least_squares` for the arguments."""
    return weight[:, keep], bias


def bias_refit(
    weight: Tensor, bias: Tensor | None, moments: Moments, keep: Tensor, damping: float
) -> tuple[Tensor, Tensor | None]:
    """Leave the kept columns as they are, and add the mean output of the removed ones to the bias.

    This is eq. 8 of FLAP (An et al. 2023). See `least_squares` for the arguments.
    """
    removed = _others(keep, weight.shape[1])
    shift = weight[:, removed] @ moments.mean[removed].to(weight)
    return weight[:, keep], shift if bias is None else bias + shift


def least_squares(
    weight: Tensor, bias: Tensor | None, moments: Moments, keep: Tensor, damping: float
) -> tuple[Tensor, Tensor | None]:
    """Refit the kept weights so that they give the dense output with the least squared error.

    The new weights W' minimise `E‖W x + e − W' x_S‖² + λ tr(Δ D Δᵀ)` with Δ = W' − W_S and D = diag(H_SS), where
    H = E[x xᵀ] and R are the removed columns. With error feedback, e is the error of the residual stream so far that
    the refit makes up for as well: `moments.error` holds its mean E[e] and its cross moment E[e xᵀ]. Without, e is 0.
    The ridge pulls toward the original kept weights, so the solution is these plus the best linear prediction of the
    output of the removed columns and of e from the kept components:
    `W' = W_S + (W_R H_RS + E[e x_Sᵀ]) (H_SS + λ D)⁻¹`. With a bias the fit is affine: H and the cross moments are
    centred, and the bias makes up for the difference of the means.

    Args:
        weight: The dense consumer W, shape `(out, n)`.
        bias: The bias of the consumer, shape `(out,)`, or None.
        moments: The moments of the input x, with Gram matrix, for all n components.
        keep: The kept columns S, ascending, shape `(kept,)`.
        damping: λ.

    Returns:
        W', shape `(out, kept)`, and the bias.
    """
    gram = moments.full_gram()
    removed, error = _others(keep, weight.shape[1]), moments.error
    cross, square = gram[removed][:, keep], gram[keep][:, keep]
    mean = moments.mean.to(square)
    if bias is not None:
        cross = cross - torch.outer(mean[removed], mean[keep])
        square = square - torch.outer(mean[keep], mean[keep])
    missing = weight[:, removed] @ cross.to(weight)
    if error is not None:
        centre = 0.0 if bias is None else torch.outer(error.mean, mean[keep])
        missing = missing + (error.cross[:, keep] - centre).to(weight)
    refitted = weight[:, keep] + solve_damped(square, missing, damping)
    if bias is not None:
        bias = bias + weight @ mean.to(weight) - refitted @ mean[keep].to(weight)
        bias = bias if error is None else bias + error.mean.to(bias)
    return refitted, bias


def _others(keep: Tensor, size: int) -> Tensor:
    others = torch.ones(size, dtype=torch.bool, device=keep.device)
    others[keep] = False
    return others.nonzero().squeeze(1)


REFITS: dict[str, Refit] = {
    "none": no_refit,
    "bias": bias_refit,
    "least_squares": least_squares,
}
