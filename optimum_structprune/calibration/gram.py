"""Products of large symmetric matrices: half the work, and no second copy. Tensors in, tensors out."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


# A Gram matrix is symmetric, so only what lies on and right of the diagonal is computed, in panels of at least so many
# rows, and in at most so many panels: smaller ones cost more than they save.
PANEL, MAX_PANELS = 512, 8


def panels(size: int) -> Iterator[slice]:
    """The rows of a square matrix, in panels."""
    step = max(PANEL, -(-size // MAX_PANELS))
    return (slice(start, min(start + step, size)) for start in range(0, size, step))


@torch.no_grad()
def update_gram_(gram: Tensor, x: Tensor, share: float) -> None:
    """Take tokens into a running Gram matrix E[x xᵀ]. `gram` has the shape `(n, n)`, `x` `(tokens, n)`."""
    for rows in panels(len(gram)):
        right = slice(rows.start, len(gram))
        add_product_(gram[rows, right], x[:, rows], x[:, right], share)
        gram[rows.stop :, rows] = gram[rows, rows.stop :].T


def operand(x: Tensor) -> Tensor:
    """Inputs in the dtype that products are taken in: fp32, unless products of what they are in are exact in fp32."""
    return x if x.is_cuda and x.dtype == torch.bfloat16 else x.float()


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
    """Some rows and columns of a matrix as a new one, made without a copy of whole rows. `matrix` has the shape `(m,
    n)`.
    """
    part = matrix.new_empty(len(rows), len(columns))
    for into, some in zip(part.split(PANEL), rows.split(PANEL), strict=True):
        into.copy_(matrix[some].index_select(1, columns))
    return part
