"""Gram matrices: products at half the work, solutions with a ridge, and no second copy. Tensors in, tensors out."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import StructPruneError


logger = logging.getLogger(__name__)

# The least number of rows of a Gram matrix that are computed at a time.
PANEL_ROWS = 512
# The smallest second moment, relative to the mean one, that the ridge of a component is computed from.
MIN_MOMENT_SHARE = 1e-6
# The number of rows of a matrix product or of a right side that are in memory a second time.
ROWS_AT_ONCE = 1024


@torch.no_grad()
def update_gram_(gram: Tensor, x: Tensor, share: float) -> None:
    """Take tokens into a running Gram matrix E[x xᵀ]. `gram` has the shape `(n, n)`, `x` `(tokens, n)`."""
    # It is symmetric, so only the part right of the diagonal is computed, in 8 panels at most: smaller ones cost more
    # than they save.
    step = max(PANEL_ROWS, -(-len(gram) // 8))
    for start in range(0, len(gram), step):
        rows, right = slice(start, min(start + step, len(gram))), slice(start, len(gram))
        add_product_(gram[rows, right], x[:, rows], x[:, right], share)
        gram[rows.stop :, rows] = gram[rows, rows.stop :].T


@torch.no_grad()
def add_product_(total: Tensor, left: Tensor, right: Tensor, share: float) -> None:
    """Take `leftᵀ right`, a sum over tokens, into a running mean in fp32. `total` has the shape `(m, n)`."""
    if left.dtype == right.dtype == torch.bfloat16 and left.is_cuda:
        product = torch.mm(left.T, right, out_dtype=torch.float32)
    else:
        product = left.T.float() @ right.float()
    # Not added by the product itself, which would lose the digits of few tokens beside many.
    total.lerp_(product.div_(len(left)), share)


@torch.no_grad()
def submatrix(matrix: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Copies some rows and columns of a matrix, `(m, n)`, without a copy of whole rows."""
    part = matrix.new_empty(len(rows), len(columns))
    for target, panel in zip(part.split(PANEL_ROWS), rows.split(PANEL_ROWS), strict=True):
        target.copy_(matrix[panel].index_select(1, columns))
    return part


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
