"""Compute new weights for the kept columns of a layer, so that they compensate for the removed columns."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from ..system.errors import StructPruneError
from .calibrate import Moments, submatrix


logger = logging.getLogger(__name__)

# The minimum second moment, relative to the mean of all second moments, in the ridge of a component.
MIN_MOMENT_SHARE = 1e-6
# The number of rows of a matrix product or of a right-hand side that are in memory a second time.
ROWS_AT_ONCE = 1024
# With this number of tokens per column, the noise of a Gram matrix doubles the ridge.
TOKENS_PER_COLUMN = 20
# The number of factorisations. Each has ten times the ridge of the previous one.
MAX_ATTEMPTS = 6


def no_refit(
    weight: Tensor, bias: Tensor | None, moments: Moments, keep: Tensor, damping: float
) -> tuple[Tensor, Tensor | None]:
    """Return the kept columns and the bias unchanged; see `least_squares` for the arguments."""
    return weight[:, keep], bias


def least_squares(
    weight: Tensor, bias: Tensor | None, moments: Moments, keep: Tensor, damping: float
) -> tuple[Tensor, Tensor | None]:
    """Refit the kept columns to the original output by ridge regression toward their original weights.

    The new weights W' minimise

        E‖W x + e − W' x_S‖² + λ tr(Δ D Δᵀ),   Δ = W' − W_S,   D = diag(H_SS),   H = E[x xᵀ],

    where S are the kept and R the removed columns, and e is the error of the residual stream that error feedback adds
    (0 without it). The solution is

        W' = W_S + (W_R H_RS + E[e x_Sᵀ]) (H_SS + λ D)⁻¹:

    the original weights plus the best linear prediction of the output of the removed columns, and of e, from the kept
    components. With a bias, H and the cross moments are centred, and the new bias is b + W E[x] + E[e] − W' E[x_S].

    Args:
        weight: The original weight W, shape `(out, n)`.
        bias: The original bias b, shape `(out,)`, or None.
        moments: The moments of the input x, with their Gram matrix, and of e.
        keep: The indices of the kept columns, shape `(kept,)`.
        damping: The strength λ of the ridge; see `ridge_strength`.

    Returns:
        The weight W', shape `(out, kept)`, and the bias.

    Raises:
        StructPruneError: If the Gram matrix cannot be factorised even with a strong ridge.
    """
    is_centred = bias is not None
    gram = moments.full_gram()
    mean = moments.mean.to(gram)
    diagonal = gram.diagonal()[keep]
    if is_centred:
        variance = diagonal - mean[keep].square()
        # The variance of a component that does not vary, as with a single token, is a rounding error.
        diagonal = torch.where(variance > MIN_MOMENT_SHARE * diagonal, variance, 0.0)

    def kept_gram(dtype: torch.dtype) -> Tensor:
        square = submatrix(gram, keep, keep)
        if is_centred:
            square.addr_(mean[keep], mean[keep], alpha=-1)
        return square.to(dtype)

    missing = _missing_output(weight, is_centred, moments, keep)
    refitted = weight[:, keep] + solve_damped(kept_gram, diagonal, missing, damping)
    if bias is None:
        return refitted, None

    new_bias = bias + weight @ mean.to(weight) - refitted @ mean[keep].to(weight)
    if moments.error_mean is not None:
        new_bias = new_bias + moments.error_mean.to(bias)
    return refitted, new_bias


def _missing_output(weight: Tensor, is_centred: bool, moments: Moments, keep: Tensor) -> Tensor:
    """Return W_R H_RS + E[e x_Sᵀ], the cross moment of the missing output and the kept components, `(out, kept)`."""
    gram = moments.full_gram()
    mean = moments.mean.to(weight)
    is_removed = torch.ones(weight.shape[1], dtype=torch.bool, device=keep.device)
    is_removed[keep] = False
    removed = is_removed.nonzero().squeeze(1)

    missing = weight.new_zeros(len(weight), len(keep))
    for panel in removed.split(ROWS_AT_ONCE):
        missing.addmm_(weight[:, panel], submatrix(gram, panel, keep).to(weight))
    if is_centred:
        missing.addr_(weight[:, removed] @ mean[removed], mean[keep], alpha=-1)

    if moments.error_mean is not None and moments.error_cross is not None:
        missing.add_(moments.error_cross[:, keep].to(weight))
        if is_centred:
            missing.addr_(moments.error_mean.to(weight), mean[keep], alpha=-1)
    return missing


def ridge_strength(damping: float, columns: int, tokens: int) -> float:
    """Return the strength λ of the ridge of a refit or of a score: `damping · (1 + 20 n / N)`.

    The noise of a Gram matrix of n `columns` from N `tokens` grows as n / N, and so does the λ that loses least on
    other text. The 20 was chosen by leaving kinds of text out; see examples/benchmarks/LOG.md.
    """
    return damping * (1 + TOKENS_PER_COLUMN * columns / max(tokens, 1))


def with_damped_factor(
    matrix: Callable[[torch.dtype], Tensor], diagonal: Tensor, damping: float, use: Callable[[Tensor], Tensor]
) -> Tensor:
    """Return `use(L)` for the lower Cholesky factor L of M + λ D, where D is the diagonal of M.

    The ridge is relative to the second moment of each component, so that the scale of a component does not matter:
    every correlation shrinks by the factor 1 / (1 + λ). The factorisation is tried in fp32, then in fp64, then with
    ten times the λ, until the result is finite. It overwrites its copy of M, so that there is only one copy.

    Args:
        matrix: A function that returns a copy of M in a dtype, shape `(n, n)`.
        diagonal: The diagonal of M, shape `(n,)`.
        damping: The strength λ.
        use: A function of the factor, shape `(n, n)`.

    Raises:
        StructPruneError: If no attempt has a finite result.
    """
    # Without a minimum, a component that is always zero would get no ridge, and the matrix would be singular.
    scale = diagonal.clamp(min=MIN_MOMENT_SHARE * float(diagonal.mean()))
    for attempt in range(MAX_ATTEMPTS):
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
    """Factorise a matrix in place, with a ridge. Return None if that fails or the result is not finite."""
    damped.diagonal().add_(scale.to(damped), alpha=ridge)

    # LAPACK stores matrices by columns, and would copy a matrix that is stored by rows. This one is symmetric.
    factor = damped.mT
    info = torch.empty((), dtype=torch.int32, device=damped.device)
    torch.linalg.cholesky_ex(factor, out=(factor, info))
    if info != 0:
        return None

    result = use(factor)
    if not torch.isfinite(result).all():
        return None
    return result


def solve_damped(matrix: Callable[[torch.dtype], Tensor], diagonal: Tensor, target: Tensor, damping: float) -> Tensor:
    """Solve X (M + λ D) = B with the ridge of `with_damped_factor`. The solution is zero if M is zero.

    Args:
        matrix: A function that returns a copy of M in a dtype, shape `(n, n)`.
        diagonal: The diagonal of M, shape `(n,)`.
        target: B, shape `(m, n)`.
        damping: The strength λ.

    Returns:
        X, shape `(m, n)`.
    """
    if float(diagonal.sum()) <= 0:
        return torch.zeros_like(target)

    def solve(factor: Tensor) -> Tensor:
        # Two triangular solves, because `cholesky_solve` copies the factor.
        solutions = []
        for rows in target.split(ROWS_AT_ONCE):
            partial = torch.linalg.solve_triangular(factor, rows.to(factor.dtype).T, upper=False)
            solution = torch.linalg.solve_triangular(factor.mT, partial, upper=True).T
            solutions.append(solution.to(target.dtype))
        return torch.cat(solutions)

    return with_damped_factor(matrix, diagonal, damping, solve)
