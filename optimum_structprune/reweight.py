"""Weights of the domains from one round to the next."""

from __future__ import annotations

from collections.abc import Sequence
from math import exp
from statistics import fmean


# How far a domain's weight may move from what was asked for, by objective.
MOST = {"mean": 2.0, "worst": 8.0}


def reweighted(
    shares: Sequence[float], asked: Sequence[float], losses: Sequence[float], rate: float, objective: str
) -> tuple[float, ...]:
    """Shares in which a domain counts more that has lost more than the mean.

    α_k ∝ α_k · exp(η (loss_k / mean loss - 1)), kept within a factor of what was asked for: 2 for the objective
    `mean`, 8 for `worst`.

    Args:
        shares: Of the round that has been.
        asked: Of the config.
        losses: Increase of the log perplexity on held-out text over the dense model, in nats per token.
        rate: η.
        objective: `mean` or `worst`.
    """
    floor = 1e-6
    losses = [max(loss, floor) for loss in losses]
    most = MOST[objective]
    moved = [
        min(max(share * exp(rate * (loss / fmean(losses) - 1)), wanted / most), wanted * most)
        for share, wanted, loss in zip(shares, asked, losses, strict=True)
    ]
    return tuple(share / sum(moved) for share in moved)
