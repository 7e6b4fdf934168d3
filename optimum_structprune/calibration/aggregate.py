"""One score per unit from the scores of several domains. Tensors in, tensors out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


HEDGE_STEPS = 50


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


def mean(scores: Tensor, shares: Tensor, width: int, quantile: float) -> Tensor:
    """The mean, weighted."""
    return shares @ scores


def highest(scores: Tensor, shares: Tensor, width: int, quantile: float) -> Tensor:
    """What the domain says that needs the unit most, whatever its weight."""
    return scores.amax(0)


def harmonic(scores: Tensor, shares: Tensor, width: int, quantile: float) -> Tensor:
    """The harmonic mean, weighted: a unit goes once any domain can do without it. Scores are positive."""
    return 1 / (shares @ scores.clamp(min=torch.finfo(scores.dtype).tiny).reciprocal().clamp(max=1e30))


def at_quantile(scores: Tensor, shares: Tensor, width: int, quantile: float) -> Tensor:
    """A quantile over the domains, whatever their weights: 0.5 is the median, towards 1 it is `highest`."""
    return scores.quantile(quantile, dim=0)


def worst(scores: Tensor, shares: Tensor, width: int, quantile: float) -> Tensor:
    """The weighted mean under which the domain that loses most loses least.

    A domain loses the scores of the units that go, out of all its own. The weights are found by multiplicative updates
    (Freund & Schapire 1999, "Adaptive game playing using multiplicative weights"): a domain that loses more than the
    mean counts more in the next step.
    """
    parts = scores - scores.amin(1, keepdim=True).clamp(max=0)
    parts = parts / parts.sum(1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)
    best, least = shares @ scores, torch.inf
    for _ in range(HEDGE_STEPS):
        mixed = shares @ scores
        gone = mixed.topk(scores.shape[1] - width, largest=False).indices
        loss = parts[:, gone].sum(1)
        if float(loss.max()) < least:
            best, least = mixed, float(loss.max())
        shares = shares * (loss / loss.mean().clamp(min=torch.finfo(loss.dtype).tiny) - 1).mul(0.5).exp()
        shares = shares / shares.sum()
    return best


AGGREGATIONS: dict[str, Callable[[Tensor, Tensor, int, float], Tensor]] = {
    "mean": mean,
    "max": highest,
    "worst": worst,
    "harmonic": harmonic,
    "quantile": at_quantile,
}


def aggregate(scores: Tensor, shares: Sequence[float], how: str, width: int, quantile: float) -> Tensor:
    """One score per unit, shape `(units,)`.

    Args:
        scores: On one scale, shape `(domains, units)`.
        shares: Weight of each domain; they sum to 1.
        how: A key of `AGGREGATIONS`.
        width: Number of units that will be kept.
        quantile: For `quantile`.
    """
    return AGGREGATIONS[how](scores, torch.tensor(shares).to(scores), width, quantile)
