"""New values of the kept weights that make up for the removed ones. Tensors in, tensors out."""

from __future__ import annotations

import torch
from torch import Tensor

from .calibrate import Moments
from .linalg import MIN_MOMENT_SHARE, ROWS_AT_ONCE, solve_damped, submatrix


def no_refit(
    weight: Tensor, bias: Tensor | None, moments: Moments, keep: Tensor, damping: float
) -> tuple[Tensor, Tensor | None]:
    """Leave the kept columns as they are; see `least_squares` for the arguments."""
    return weight[:, keep], bias


def least_squares(
    weight: Tensor, bias: Tensor | None, moments: Moments, keep: Tensor, damping: float
) -> tuple[Tensor, Tensor | None]:
    """Refit the kept weights so that they give the dense output with the least squared error.

    The new weights W' minimise `E‖W x + e − W' x_S‖² + λ tr(Δ D Δᵀ)` with Δ = W' − W_S and D = diag(H_SS), where H =
    E[x xᵀ] and R are the removed columns. With error feedback, e is the error of the residual stream so far that the
    refit makes up for as well, of which the moments hold E[e] and E[e xᵀ]. Without, e is 0. The ridge pulls toward the
    original kept weights, so the solution is these plus the best linear prediction of the output of the removed
    columns and of e from the kept components: `W' = W_S + (W_R H_RS + E[e x_Sᵀ]) (H_SS + λ D)⁻¹`. With a bias the fit
    is affine: H and the cross moments are centred, and the bias makes up for the difference of the means. `weight` has
    the shape `(out, n)`, `bias` `(out,)`, `keep` `(kept,)`, W' `(out, kept)`.
    """
    gram = moments.full_gram()
    mean, diagonal = moments.mean.to(gram), gram.diagonal()[keep]
    if bias is not None:
        variance = diagonal - mean[keep].square()
        # The variance of a component that does not vary, as with a single token, is a rounding error.
        diagonal = torch.where(variance > MIN_MOMENT_SHARE * diagonal, variance, 0.0)

    def kept(dtype: torch.dtype) -> Tensor:
        square = submatrix(gram, keep, keep)
        if bias is not None:
            square.addr_(mean[keep], mean[keep], alpha=-1)
        return square.to(dtype)

    missing = _missing(weight, bias is not None, moments, keep)
    refitted = weight[:, keep] + solve_damped(kept, diagonal, missing, damping)
    if bias is not None:
        bias = bias + weight @ mean.to(weight) - refitted @ mean[keep].to(weight)
        bias = bias if moments.error_mean is None else bias + moments.error_mean.to(bias)
    return refitted, bias


def _missing(weight: Tensor, centred: bool, moments: Moments, keep: Tensor) -> Tensor:
    """`W_R H_RS + E[e x_Sᵀ]`, what the kept columns are to make up for, shape `(out, kept)`."""
    gram, mean = moments.full_gram(), moments.mean.to(weight)
    removed = torch.ones(weight.shape[1], dtype=torch.bool, device=keep.device)
    removed[keep] = False
    removed = removed.nonzero().squeeze(1)
    missing = weight.new_zeros(len(weight), len(keep))
    for panel in removed.split(ROWS_AT_ONCE):
        missing.addmm_(weight[:, panel], submatrix(gram, panel, keep).to(weight))
    if centred:
        missing.addr_(weight[:, removed] @ mean[removed], mean[keep], alpha=-1)
    if moments.error_mean is not None and moments.error_cross is not None:
        missing.add_(moments.error_cross[:, keep].to(weight))
        if centred:
            missing.addr_(moments.error_mean.to(weight), mean[keep], alpha=-1)
    return missing
