"""One score per unit from the scores of several domains. Tensors in, tensors out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def normalised(scores: Tensor, how: str) -> Tensor:
    """Scores of several domains on one scale, shape `(domains, units)`.

    Args:
        scores: Per domain, shape `(domains, units)`.
        how: `none` leaves them, `energy` divides by each domain's mean size, `zscore` makes mean 0 and deviation 1,
            `rank` gives the worst unit 0 and the best 1.
    """
    size = scores.abs().mean(1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)
    if how == "energy":
        return scores / size
    if how == "zscore":
        # Scores that are all alike differ by rounding, which says nothing.
        least = size * torch.finfo(scores.dtype).eps
        return (scores - scores.mean(1, keepdim=True)) / scores.std(1, keepdim=True, correction=0).clamp(min=least)
    if how == "rank":
        return scores.argsort(dim=1, stable=True).argsort(1).to(scores) / max(scores.shape[1] - 1, 1)
    return scores


def mean(scores: Tensor, shares: Tensor, quantile: float) -> Tensor:
    """The mean, weighted."""
    return shares @ scores


def highest(scores: Tensor, shares: Tensor, quantile: float) -> Tensor:
    """What the domain says that needs the unit most, whatever its weight."""
    return scores.amax(0)


def harmonic(scores: Tensor, shares: Tensor, quantile: float) -> Tensor:
    """The harmonic mean, weighted: a unit goes once any domain can do without it. Scores are positive."""
    return 1 / (shares @ scores.clamp(min=torch.finfo(scores.dtype).tiny).reciprocal().clamp(max=1e30))


def at_quantile(scores: Tensor, shares: Tensor, quantile: float) -> Tensor:
    """A quantile over the domains, whatever their weights: 0.5 is the median, towards 1 it is `highest`."""
    return scores.quantile(quantile, dim=0)


AGGREGATIONS: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "mean": mean,
    "max": highest,
    "harmonic": harmonic,
    "quantile": at_quantile,
}


def aggregate(scores: Tensor, shares: Sequence[float], how: str, quantile: float) -> Tensor:
    """One score per unit, shape `(units,)`.

    Args:
        scores: On one scale, shape `(domains, units)`.
        shares: Weight of each domain; they sum to 1.
        how: A key of `AGGREGATIONS`.
        quantile: For `quantile`.
    """
    return AGGREGATIONS[how](scores, torch.tensor(shares).to(scores), quantile)


def standardised(columns: Tensor, columns_per_unit: int) -> Tensor:
    """Scores that compare over layers and spaces: the mean z-score of a unit's columns.

    FLAP (An et al. 2023, section 3.3): every column's score is standardised over the columns of its layer, and a head
    takes the mean of its own. A mean and not a sum, so that it is a score per column, and with it per parameter.

    Args:
        columns: One score per column of a consumer, shape `(units * columns_per_unit,)`.
        columns_per_unit: Columns per unit.

    Returns:
        Shape `(units,)`.
    """
    spread = columns.std(correction=0).clamp(min=torch.finfo(columns.dtype).tiny)
    return ((columns - columns.mean()) / spread).reshape(-1, columns_per_unit).mean(1)
