"""The largest cut within a loss: which cuts to try, and what a report says about a loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from math import inf, log
from statistics import fmean, geometric_mean

from ..record.report import Report
from ..record.table import margin_of_mean


# The number of trials, and the number if the next larger cut that was tried is far larger than the best one.
TRIALS = 4
MOST_TRIALS = 6
LOSS_OF_COSINE = 10  # multilingual-e5-small misses 0 to 11 translations of 1,000 for 0.001 of it
KINDS, OTHER, LANGUAGES = "your kinds", "other text", "the languages to keep"
# The exponent of the loss as a function of the removed share, until two cuts have been measured.
FIRST_POWER = 1.5

# A loss with its margin of error, which is None if only one document was measured.
Loss = tuple[float, float | None]


def removed_share(report: Report) -> float:
    """Return the share of the parameters that a pruning has removed."""
    return 1 - report.parameters["after"] / report.parameters["before"]


def losses_in(report: Report) -> dict[str, Loss]:
    """Return the losses in a report with their margins of error, by text.

    The loss of a language model is its perplexity as a multiple of the dense model's, minus 1, in the geometric mean
    over the domains. The loss of an encoder is ten times the difference of its mean cosine from 1, which is at least
    the share of translations that it misses and the dense model found.
    """
    if report.embeddings:
        return _encoder_losses(report)

    ratios = [perplexity["after"] / perplexity["before"] for perplexity in report.perplexity.values()]
    margins = [margins["ratio"] for margins in report.perplexity_margin.values()]
    losses = {KINDS: (geometric_mean(ratios) - 1, margin_of_mean(ratios, margins))}
    perplexity = report.other.get("perplexity")
    if perplexity:
        ratio = perplexity["after"] / perplexity["before"]
        losses[OTHER] = (ratio - 1, margin_of_mean([ratio], [report.other["margin"]["ratio"]]))
    return losses


def _encoder_losses(report: Report) -> dict[str, Loss]:
    """Return the losses of an encoder by text."""
    figures_by_text = {
        KINDS: [figures["after"] for figures in report.embeddings.values()],
        LANGUAGES: [figures for figures in report.languages.values() if figures["wanted"]],
    }
    losses: dict[str, Loss] = {}
    for text, figures in figures_by_text.items():
        if figures:
            cosines = [values["cosine"] for values in figures]
            margin = margin_of_mean(cosines, [values["cosine_margin"] for values in figures])
            scaled_margin = None if margin is None else LOSS_OF_COSINE * margin
            losses[text] = (LOSS_OF_COSINE * (1 - fmean(cosines)), scaled_margin)
    return losses


def largest_cut(measure: Callable[[float], float], limit: float, first: float) -> dict[float, float]:
    """Search for the largest share that can be removed at a loss within a limit.

    Args:
        measure: A function that returns the loss with a share removed. An infinite loss means that this share cannot
            be removed, and does not count as a trial.
        limit: The largest loss.
        first: The share of the first trial.

    Returns:
        The measured losses by share. The share 0 has the loss 0.
    """
    losses = {0.0: 0.0}
    share = first
    trials = 0
    while True:
        losses[share] = measure(share)
        if losses[share] < inf:
            trials += 1
        met = max(removed for removed, loss in losses.items() if loss <= limit)
        above = min((removed for removed in losses if removed > met), default=inf)
        gap = above - met
        most_trials = TRIALS if gap < met / 2 else MOST_TRIALS
        if losses[met] >= 0.6 * limit or gap < max(met / 20, 1e-3) or trials >= most_trials:
            return losses
        share = _next_share(losses, limit, met, above)


def _next_share(losses: Mapping[float, float], limit: float, met: float, above: float) -> float:
    """Return the share to try next, between the largest that `met` the limit and the smallest `above` it."""
    gap = above - met
    if losses.get(above) == inf:
        return met + gap / 2

    # Aim a little below the limit, because measurements are noisy.
    near, loss, power = _power_law(losses, above)
    share = near * (0.85 * limit / loss) ** (1 / power)
    if above < inf:
        lowest = met + gap / 5 if met else 0
        return min(max(share, lowest), met + gap * 4 / 5)
    return min(max(share, 1.2 * met), 3 * met, (1 + met) / 2)


def expected_loss(losses: Mapping[float, float], share: float) -> float:
    """Return the loss with this share removed, by a power law through the nearest measured losses."""
    near, loss, power = _power_law(losses, share)
    return float(loss * (share / near) ** power)


def _power_law(losses: Mapping[float, float], share: float) -> tuple[float, float, float]:
    """Return a measured share at or above `share`, or else the largest one, with its loss and the exponent there."""
    # Losses below 1e-4 are noise, and losses above 1 follow no power law.
    clamped = {removed: min(max(loss, 1e-4), 1.0) for removed, loss in losses.items() if removed and loss < inf}
    pairs = list(pairwise(sorted(clamped)))
    if not pairs:
        removed, loss = clamped.popitem()
        return removed, loss, FIRST_POWER
    left, right = next((pair for pair in pairs if pair[1] >= share), pairs[-1])
    power = log(clamped[right] / clamped[left]) / log(right / left)
    return right, clamped[right], max(power, 1.0)
