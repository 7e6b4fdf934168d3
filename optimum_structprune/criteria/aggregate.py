"""One score per unit from the scores of several domains. Tensors in, tensors out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def normalised(scores: Tensor, how: str) -> Tensor:
    """The scores of several domains on one scale, shape `(domains, units)`."""
    size = scores.abs().mean(1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)
    if how == "energy":
        return scores / size
    if how == "zscore":
        # Scores that are all alike still differ by rounding, which must not be scaled up.
        least = size * torch.finfo(scores.dtype).eps
        return (scores - scores.mean(1, keepdim=True)) / scores.std(1, keepdim=True, correction=0).clamp(min=least)
    return scores


def aggregate(scores: Tensor, shares: Sequence[float], how: str) -> Tensor:
    """One score per unit, shape `(units,)`. `scores` has the shape `(domains, units)`."""
    return scores.amax(0) if how == "max" else torch.tensor(shares).to(scores) @ scores


def standardised(columns: Tensor, columns_per_unit: int) -> Tensor:
    """Scores that can be compared over layers and spaces: the mean z-score of a unit's columns.

    As in FLAP (An et al. 2023, section 3.3), every column's score is standardised over the columns of its layer, and a
    head gets the mean over its own columns. It is a mean and not a sum, so that it is a score per column, and thereby
    per parameter. `columns` has the shape `(units * columns_per_unit,)`.

    Returns:
        The scores, shape `(units,)`.
    """
    spread = columns.std(correction=0).clamp(min=torch.finfo(columns.dtype).tiny)
    return ((columns - columns.mean()) / spread).reshape(-1, columns_per_unit).mean(1)
