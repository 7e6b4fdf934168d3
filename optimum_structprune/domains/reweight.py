"""Weights of the domains from one round to the next."""

from __future__ import annotations

from collections.abc import Sequence
from math import exp
from statistics import fmean


# The factor by which a domain's weight may differ from the config's. A factor of 8 brings the worst domain no further,
# and costs the others four times as much (docs/benchmarks.md).
MOST = 2.0
# Smaller losses, in nats per token, are noise.
LEAST_LOSS = 1e-6
# Larger ones, also infinite ones, say no more than that the domain is lost.
MOST_LOSS = 100.0
HALVINGS = 100


def reweighted(shares: Sequence[float], weights: Sequence[float], losses: Sequence[float]) -> tuple[float, ...]:
    """The shares of the next round, in which domains that have lost more than the mean count more.

    The share of domain k becomes α_k ∝ α_k · exp(loss_k / mean loss - 1), kept within a factor of 2 of its weight in
    the config.

    Returns:
        Shares that sum to 1.
    """
    sizes = [min(max(loss, LEAST_LOSS), MOST_LOSS) for loss in losses]
    typical = fmean(sizes)
    moved = [share * exp(size / typical - 1) for share, size in zip(shares, sizes, strict=True)]
    return within(moved, weights, MOST)


def within(values: Sequence[float], weights: Sequence[float], most: float) -> tuple[float, ...]:
    """Shares in the proportions of `values`, each within a factor `most` of its weight.

    Returns:
        Shares that sum to 1.
    """

    def clipped(scale: float) -> list[float]:
        return [
            min(max(scale * value, share / most), share * most) for value, share in zip(values, weights, strict=True)
        ]

    # The sum of the clipped shares grows with the scale, from 1 / most to most.
    low, high = 0.0, most * max(share / value for value, share in zip(values, weights, strict=True))
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(clipped(middle)) < 1 else (low, middle)
    return tuple(clipped(high))
