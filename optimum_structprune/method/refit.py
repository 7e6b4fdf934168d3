"""New values of the kept weights that make up for the removed ones, by linear algebra with a ridge."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import StructPruneError
from .calibrate import Moments, submatrix


logger = logging.getLogger(__name__)

# The smallest second moment, relative to the mean one, that the ridge of a component is computed from.
MIN_MOMENT_SHARE = 1e-6
# The number of rows of a matrix product or of a right side that are in memory a second time.
ROWS_AT_ONCE = 1024


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


def ridge_strength(damping: float, columns: int, tokens: int) -> float:
    """The λ of a refit or a score, larger with less text: `damping (1 + 20 n / N)`.

    The noise of a Gram matrix of n columns from N tokens grows as n / N, and so does the λ that loses least on other
    text. The 20 was chosen by leaving kinds of text out; examples/benchmarks/LOG.md has the figures.
    """
    return damping * (1 + 20 * columns / max(tokens, 1))


def with_damped_factor(
    matrix: Callable[[torch.dtype], Tensor], diagonal: Tensor, damping: float, use: Callable[[Tensor], Tensor]
) -> Tensor:
    """The result of `use` for the Cholesky factor of `M + λ D`, where D is the diagonal of a matrix M.

    The ridge is relative to every component's own second moment, so that it does not depend on the scale of a
    component: every correlation is lowered by the factor 1 / (1 + λ). The factorisation is tried in fp32, then in
    fp64, then with ten times the damping, and so on, until the result is finite. It happens in place, so that M is in
    memory only once more. `matrix` has the shape `(n, n)`, `diagonal` `(n,)`, `use` `(n, n)`.
    """
    # A component that is always zero would get no ridge, and the matrix would stay singular.
    scale = diagonal.clamp(min=MIN_MOMENT_SHARE * float(diagonal.mean()))
    for attempt in range(6):
        ridge = max(damping, 1e-8) * 10.0**attempt
        for dtype in (torch.float32, torch.float64):
            result = _factored(matrix(dtype), scale, ridge, use)
            if result is not None:
                return result
        logger.warning("The Gram matrix is not positive definite with damping %g; trying ten times that.", ridge)
    raise StructPruneError(
        "The Gram matrix of a consumer's input cannot be inverted even with damping; the activations are broken."
    )


def _factored(damped: Tensor, scale: Tensor, ridge: float, use: Callable[[Tensor], Tensor]) -> Tensor | None:
    damped.diagonal().add_(scale.to(damped), alpha=ridge)
    # LAPACK counts by columns, and would have to copy what is stored by rows. The matrix is symmetric.
    factor = damped.mT
    info = torch.empty((), dtype=torch.int32, device=damped.device)
    torch.linalg.cholesky_ex(factor, out=(factor, info))
    if info != 0:
        return None
    result = use(factor)
    return result if torch.isfinite(result).all() else None


def solve_damped(matrix: Callable[[torch.dtype], Tensor], diagonal: Tensor, right: Tensor, damping: float) -> Tensor:
    """Solve `X (M + λ D) = right`, with the ridge of `with_damped_factor`. `matrix` has the shape `(n, n)`, `diagonal`
    `(n,)`, `right` and the result `(m, n)`; the result is zero for a matrix of zeros.
    """
    if float(diagonal.sum()) <= 0:
        return torch.zeros_like(right)

    def solve(factor: Tensor) -> Tensor:
        # In two steps, because `cholesky_solve` copies the factor.
        solutions = []
        for rows in right.split(ROWS_AT_ONCE):
            half = torch.linalg.solve_triangular(factor, rows.to(factor.dtype).T, upper=False)
            solutions.append(torch.linalg.solve_triangular(factor.mT, half, upper=True).T.to(right.dtype))
        return torch.cat(solutions)

    return with_damped_factor(matrix, diagonal, damping, solve)
