"""Weights of the domains from one round to the next."""

from __future__ import annotations

from collections.abc import Sequence
from math import exp
from statistics import fmean


# How far a domain's weight may move from what was asked for, by objective.
MOST = {"mean": 2.0, "worst": 8.0}
# Smaller losses, in nats per token, are noise.
LEAST_LOSS = 1e-6
HALVINGS = 100


def reweighted(
    shares: Sequence[float], asked: Sequence[float], losses: Sequence[float], rate: float, objective: str
) -> tuple[float, ...]:
    """Shares in which a domain counts more that has lost more than the mean.

    α_k ∝ α_k · exp(η (loss_k / mean loss - 1)), kept within a factor of what was asked for: 2 for the objective
    `mean`, 8 for `worst`.

    Args:
        shares: Of the round that has been.
        asked: Of the config; they sum to 1.
        losses: Increase of the log perplexity on held-out text over the dense model, in nats per token.
        rate: η.
        objective: `mean` or `worst`.
    """
    sizes = [max(loss, LEAST_LOSS) for loss in losses]
    typical = fmean(sizes)
    moved = [share * exp(rate * (size / typical - 1)) for share, size in zip(shares, sizes, strict=True)]
    return within(moved, asked, MOST[objective])


def within(values: Sequence[float], asked: Sequence[float], most: float) -> tuple[float, ...]:
    """Shares in the proportions of `values`, but none further than a factor `most` from what was asked for.

    Args:
        values: Positive.
        asked: Shares that sum to 1.
        most: 1 or more.
    """

    def clipped(scale: float) -> list[float]:
        return [
            min(max(scale * value, share / most), share * most) for value, share in zip(values, asked, strict=True)
        ]

    # The sum of the clipped shares grows with the scale, from 1 / most to most.
    low, high = 0.0, most * max(share / value for value, share in zip(values, asked, strict=True))
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(clipped(middle)) < 1 else (low, middle)
    return tuple(clipped(high))
