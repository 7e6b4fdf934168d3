"""New values of the kept weights that make up for the removed ones. Tensors in, tensors out."""

from __future__ import annotations

import torch
from torch import Tensor

from .calibrate import Moments
from .linalg import LEAST, ROWS, solve_damped, submatrix


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

    The new weights W' minimise `E‖W x + e − W' x_S‖² + λ tr(Δ D Δᵀ)` with Δ = W' − W_S and D = diag(H_SS), where H =
    E[x xᵀ] and R are the removed columns. With error feedback, e is the error of the residual stream so far that the
    refit makes up for as well: `moments.error` holds its mean E[e] and its cross moment E[e xᵀ]. Without, e is 0. The
    ridge pulls toward the original kept weights, so the solution is these plus the best linear prediction of the
    output of the removed columns and of e from the kept components: `W' = W_S + (W_R H_RS + E[e x_Sᵀ]) (H_SS + λ
    D)⁻¹`. With a bias the fit is affine: H and the cross moments are centred, and the bias makes up for the difference
    of the means. `weight` has the shape `(out, n)`, `bias` `(out,)`, `keep` `(kept,)`, W' `(out, kept)`.
    """
    gram, error = moments.full_gram(), moments.error
    mean, diagonal = moments.mean.to(gram), gram.diagonal()[keep]
    if bias is not None:
        variance = diagonal - mean[keep].square()
        # The variance of a component that does not vary, as with a single token, is a rounding error.
        diagonal = torch.where(variance > LEAST * diagonal, variance, 0.0)

    def kept(dtype: torch.dtype) -> Tensor:
        square = submatrix(gram, keep, keep)
        if bias is not None:
            square.addr_(mean[keep], mean[keep], alpha=-1)
        return square.to(dtype)

    missing = _missing(weight, bias is not None, moments, keep)
    refitted = weight[:, keep] + solve_damped(kept, diagonal, missing, damping)
    if bias is not None:
        bias = bias + weight @ mean.to(weight) - refitted @ mean[keep].to(weight)
        bias = bias if error is None else bias + error.mean.to(bias)
    return refitted, bias


def _missing(weight: Tensor, centred: bool, moments: Moments, keep: Tensor) -> Tensor:
    """`W_R H_RS + E[e x_Sᵀ]`, what the kept columns are to make up for, shape `(out, kept)`."""
    gram, error, mean = moments.full_gram(), moments.error, moments.mean.to(weight)
    removed = _others(keep, weight.shape[1])
    missing = weight.new_zeros(len(weight), len(keep))
    for panel in removed.split(ROWS):
        missing.addmm_(weight[:, panel], submatrix(gram, panel, keep).to(weight))
    if centred:
        missing.addr_(weight[:, removed] @ mean[removed], mean[keep], alpha=-1)
    if error is not None:
        missing.add_(error.cross[:, keep].to(weight))
        if centred:
            missing.addr_(error.mean.to(weight), mean[keep], alpha=-1)
    return missing


@torch.no_grad()
def squared_errors(
    weight: Tensor, bias: Tensor | None, moments: Moments, keep: Tensor, refitted: Tensor, new_bias: Tensor | None
) -> tuple[float, float]:
    """The squared error that a consumer leaves without a refit and with one, from the Gram matrix of its input.

    It is `E‖W x + b + e − W' x_S − b'‖²`, which `least_squares` minimises but for its ridge; without a refit W' is W_S
    and b' is b. See `least_squares` for the symbols. `weight` has the shape `(out, n)`, `bias` `(out,)`, `keep`
    `(kept,)`, `refitted` `(out, kept)`, `new_bias` `(out,)`.
    """
    removed = _others(keep, weight.shape[1])
    before = _energy(weight[:, removed], moments, removed)
    lost = weight.index_copy(1, keep, weight[:, keep] - refitted)
    after = _energy(lost, moments, torch.arange(weight.shape[1], device=weight.device))
    if new_bias is not None:
        shift = new_bias if bias is None else new_bias - bias
        after += float(shift.square().sum() - 2 * shift @ (lost @ moments.mean.to(lost)))
        if moments.error is not None:
            after -= 2 * float(shift @ moments.error.mean.to(lost))
    return max(before, 0.0), max(after, 0.0)


def _energy(lost: Tensor, moments: Moments, columns: Tensor) -> float:
    """`E‖D x_C + e‖²` for the lost weights D, shape `(out, |C|)`, of the columns C."""
    gram, error = moments.full_gram(), moments.error
    parts = [
        ((lost @ submatrix(gram, columns, panel).to(lost)) * lost_panel).sum(dtype=torch.float64)
        for panel, lost_panel in zip(columns.split(ROWS), lost.split(ROWS, 1), strict=True)
    ]
    energy = float(torch.stack(parts).sum())
    if error is None:
        return energy
    crossed = (lost * error.cross[:, columns].to(lost)).sum(dtype=torch.float64)
    return energy + 2 * float(crossed) + float(error.energy)


def _others(keep: Tensor, size: int) -> Tensor:
    others = torch.ones(size, dtype=torch.bool, device=keep.device)
    others[keep] = False
    return others.nonzero().squeeze(1)
