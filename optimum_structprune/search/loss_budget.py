"""The largest cut within a loss: which cuts to try, and what a report says about a loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from math import inf, log
from statistics import fmean

from ..record.figures import Figure, margin_of_mean, mean_ratio, ratios_of
from ..record.report import Report


# The number of trials, and the number if the next larger cut that was tried is far larger than the best one.
TRIALS = 4
MOST_TRIALS = 6
LOSS_OF_COSINE = 10  # multilingual-e5-small misses 0 to 11 translations of 1,000 for 0.001 of it
KINDS = "your domains"
OTHER = "unseen text"
LANGUAGES = "the wanted languages"
# The exponent of the loss as a function of the removed share, until two cuts have been measured.
FIRST_POWER = 1.5

# A loss with its margin of error, which is None if only one document was measured.
Loss = tuple[float, float | None]


def losses_in(report: Report) -> dict[str, Loss]:
    """Return the losses in a report, with the margins of their confidence intervals, by text.

    The loss of a language model is its perplexity relative to the original model, less 1, as the geometric mean over
    the domains. The loss of an encoder is ten times the difference of the mean cosine from 1, which is at least the
    share of translations that it no longer finds.
    """
    vectors = [domain.vectors for domain in report.domains.values()]
    if any(vectors):
        return _encoder_losses(report)

    mean, margin = mean_ratio(ratios_of(report.domains).values())
    losses: dict[str, Loss] = {KINDS: (mean - 1, margin)}
    unseen = None if report.unseen is None else report.unseen.perplexity
    if unseen is not None and unseen.ratio is not None:
        losses[OTHER] = (unseen.ratio - 1, unseen.margin)
    return losses


def _encoder_losses(report: Report) -> dict[str, Loss]:
    """Return the losses of an encoder by text."""
    results_by_text = {
        KINDS: [domain.vectors for domain in report.domains.values()],
        LANGUAGES: [language.vectors for language in report.languages.values() if language.wanted],
    }
    losses: dict[str, Loss] = {}
    for text, results in results_by_text.items():
        cosines = [result.cosine for result in results if result is not None and result.cosine is not None]
        if cosines:
            losses[text] = _cosine_loss(cosines)
    return losses


def _cosine_loss(cosines: list[Figure]) -> Loss:
    """Return the loss of an encoder by the cosines of its domains, with its margin."""
    values = [figure.last or 0.0 for figure in cosines]
    margin = margin_of_mean(values, [figure.margin for figure in cosines])
    return LOSS_OF_COSINE * (1 - fmean(values)), None if margin is None else LOSS_OF_COSINE * margin


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
