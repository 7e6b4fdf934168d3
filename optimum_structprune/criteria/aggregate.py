"""One score per unit from the scores of several domains. Tensors in, tensors out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def normalised(scores: Tensor, how: str) -> Tensor:
    """The scores of several domains on one scale, shape `(domains, units)`.

    Args:
        scores: The scores of each domain, shape `(domains, units)`.
        how: The way: `none` leaves the scores as they are, `energy` divides them by each domain's mean absolute score,
            `zscore` gives each domain mean 0 and standard deviation 1, `rank` gives the worst unit 0 and the best 1.
    """
    size = scores.abs().mean(1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)
    if how == "energy":
        return scores / size
    if how == "zscore":
        # Scores that are all alike still differ by rounding, which must not be scaled up.
        least = size * torch.finfo(scores.dtype).eps
        return (scores - scores.mean(1, keepdim=True)) / scores.std(1, keepdim=True, correction=0).clamp(min=least)
    if how == "rank":
        return scores.argsort(dim=1, stable=True).argsort(1).to(scores) / max(scores.shape[1] - 1, 1)
    return scores


def mean(scores: Tensor, shares: Tensor, quantile: float) -> Tensor:
    """The weighted mean."""
    return shares @ scores


def highest(scores: Tensor, shares: Tensor, quantile: float) -> Tensor:
    """The highest score, that of the domain which needs the unit most, whatever the weight of the domain."""
    return scores.amax(0)


def harmonic(scores: Tensor, shares: Tensor, quantile: float) -> Tensor:
    """The weighted harmonic mean of positive scores: it is near 0 as soon as one domain can do without the unit."""
    return 1 / (shares @ scores.clamp(min=torch.finfo(scores.dtype).tiny).reciprocal().clamp(max=1e30))


def at_quantile(scores: Tensor, shares: Tensor, quantile: float) -> Tensor:
    """A quantile over the domains, whatever their weights: 0.5 is the median, and 1 is `highest`."""
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
        scores: The scores of each domain, on one scale, shape `(domains, units)`.
        shares: The weight of each domain; the weights sum to 1.
        how: A key of `AGGREGATIONS`.
        quantile: The quantile that `quantile` takes.
    """
    return AGGREGATIONS[how](scores, torch.tensor(shares).to(scores), quantile)


def standardised(columns: Tensor, columns_per_unit: int) -> Tensor:
    """Scores that can be compared over layers and spaces: the mean z-score of a unit's columns.

    As in FLAP (An et al. 2023, section 3.3), every column's score is standardised over the columns of its layer, and a
    head gets the mean over its own columns. It is a mean and not a sum, so that it is a score per column, and thereby
    per parameter.

    Args:
        columns: One score per column of a consumer, shape `(units * columns_per_unit,)`.
        columns_per_unit: The number of columns that a unit owns.

    Returns:
        The scores, shape `(units,)`.
    """
    spread = columns.std(correction=0).clamp(min=torch.finfo(columns.dtype).tiny)
    return ((columns - columns.mean()) / spread).reshape(-1, columns_per_unit).mean(1)
