"""New values of the kept weights that make up for the removed ones. Tensors in, tensors out."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from ..calibration.gram import submatrix
from ..calibration.moments import Moments
from ..errors import StructPruneError


logger = logging.getLogger(__name__)

# The smallest second moment, relative to the mean one, that the ridge of a component is computed from.
LEAST = 1e-6
# The number of rows of a matrix product or of a right side that are in memory a second time.
ROWS = 1024
# With so many tokens per column, the ridge is twice what it is with any number of tokens.
TOKENS_PER_COLUMN = 20

Refit = Callable[[Tensor, "Tensor | None", Moments, Tensor, float], "tuple[Tensor, Tensor | None]"]


def ridge_strength(damping: float, columns: int, tokens: int) -> float:
    """The λ of a refit or a score, which grows where there is little text: `damping (1 + 20 n / N)`.

    The noise of a Gram matrix of n columns from N tokens grows as n / N, and so does the λ that loses least on other
    text. The 20 was chosen by leaving kinds of text out; docs/benchmarks.md has the figures.
    """
    return damping * (1 + TOKENS_PER_COLUMN * columns / max(tokens, 1))


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
    scale = diagonal.clamp(min=LEAST * float(diagonal.mean()))
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
    `(n,)`, `right` `(m, n)`.

    Returns:
        X, shape `(m, n)`, in the dtype of `right`; zeros for a matrix of zeros.
    """
    if float(diagonal.sum()) <= 0:
        return torch.zeros_like(right)

    def solve(factor: Tensor) -> Tensor:
        # In two steps, because `cholesky_solve` copies the factor.
        solutions = []
        for rows in right.split(ROWS):
            half = torch.linalg.solve_triangular(factor, rows.to(factor.dtype).T, upper=False)
            solutions.append(torch.linalg.solve_triangular(factor.mT, half, upper=True).T.to(right.dtype))
        return torch.cat(solutions)

    return with_damped_factor(matrix, diagonal, damping, solve)


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


def slope_refit(
    weight: Tensor, bias: Tensor | None, moments: Moments, keep: Tensor, damping: float
) -> tuple[Tensor, Tensor | None]:
    """Scale every output by the slope of the regression of its dense values on its pruned ones.

    This is the regression of SlimLLM (Guo et al., ICML 2025, arXiv 2505.22689). Where the consumer has a bias, it
    takes the intercept; without one the line goes through zero, as the model has no place for an intercept. See
    `least_squares` for the arguments.
    """
    gram, mean, kept = moments.full_gram().to(weight), moments.mean.to(weight), weight[:, keep]
    products = ((weight @ gram)[:, keep] * kept).sum(1)
    squares = ((kept @ submatrix(gram, keep, keep)) * kept).sum(1)
    dense, pruned = weight @ mean, kept @ mean[keep]
    if bias is not None:
        products, squares = products - dense * pruned, squares - pruned.square()
    slope = torch.where(squares > 0, products / squares, torch.ones_like(squares))
    return slope[:, None] * kept, None if bias is None else bias + dense - slope * pruned


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
    of the means. `weight` has the shape `(out, n)`, `bias` `(out,)`, `keep` `(kept,)`.

    Returns:
        W', shape `(out, kept)`, and the bias.
    """
    gram, error = moments.full_gram(), moments.error
    mean, diagonal = moments.mean.to(gram), gram.diagonal()[keep]
    if bias is not None:
        variance = diagonal - mean[keep].square()
        # What is left of a component that does not vary, as with a single token, is rounding.
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
    for some in removed.split(ROWS):
        missing.addmm_(weight[:, some], submatrix(gram, some, keep).to(weight))
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
        ((lost @ submatrix(gram, columns, some).to(lost)) * own).sum(dtype=torch.float64)
        for some, own in zip(columns.split(ROWS), lost.split(ROWS, 1), strict=True)
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


REFITS: dict[str, Refit] = {
    "none": no_refit,
    "bias": bias_refit,
    "slope": slope_refit,
    "least_squares": least_squares,
}
