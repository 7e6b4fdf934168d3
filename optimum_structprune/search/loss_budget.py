"""Search for the largest cut within a loss: choose the cuts to try, and read losses from reports."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise
from math import inf, log
from statistics import fmean

from ..record.figures import Figure, TextResult, margin_of_mean, mean_ratio, ratios_of
from ..record.report import Report


# The maximum number of trials, and the maximum while no tried cut is only a little too large.
TRIALS = 4
MOST_TRIALS = 6
# The loss per difference of the cosine from 1. multilingual-e5-small misses 0 to 11 of 1,000 translations per 0.001.
LOSS_OF_COSINE = 10
YOUR_DOMAINS = "your domains"
ON_UNSEEN_TEXT = "unseen text"
WANTED_LANGUAGES = "the wanted languages"
# The exponent of the loss as a function of the removed share, until two cuts have been measured.
FIRST_POWER = 1.5

# A loss with its margin of error, which is None if only one document was measured.
Loss = tuple[float, float | None]


def losses_in(report: Report) -> dict[str, Loss]:
    """Return the losses in a report, with the margins of their confidence intervals, by text.

    The loss of a language model is its perplexity relative to the original model minus 1, as the geometric mean over
    the domains. The loss of an encoder is ten times the difference of the mean cosine from 1. It is about the largest
    measured share of translations that the encoder no longer finds.
    """
    if report.has_vectors:
        return _encoder_losses(report)

    mean, margin = mean_ratio(ratios_of(report.domains).values())
    losses: dict[str, Loss] = {YOUR_DOMAINS: (mean - 1, margin)}
    if report.unseen is not None:
        perplexity = report.unseen.perplexity
        if perplexity is not None and perplexity.ratio is not None:
            losses[ON_UNSEEN_TEXT] = (perplexity.ratio - 1, perplexity.margin)
    return losses


def _encoder_losses(report: Report) -> dict[str, Loss]:
    """Return the losses of an encoder by text."""
    results_by_text: dict[str, Iterable[TextResult]] = {
        YOUR_DOMAINS: report.domains.values(),
        WANTED_LANGUAGES: [language for language in report.languages.values() if language.wanted],
    }
    losses: dict[str, Loss] = {}
    for text, results in results_by_text.items():
        cosines = [result.cosine for result in results if result.cosine is not None]
        if cosines:
            losses[text] = _cosine_loss(cosines)
    return losses


def _cosine_loss(cosines: list[Figure]) -> Loss:
    """Return the loss of an encoder by the cosines of its domains, with its margin."""
    values = [figure.last or 0.0 for figure in cosines]
    loss = LOSS_OF_COSINE * (1 - fmean(values))
    margin = margin_of_mean(values, [figure.margin for figure in cosines])
    if margin is None:
        return loss, None
    return loss, LOSS_OF_COSINE * margin


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

        # The largest cut lies between `lower` and `upper`.
        lower = max(removed for removed, loss in losses.items() if loss <= limit)
        upper = min((removed for removed in losses if removed > lower), default=inf)
        gap = upper - lower
        max_trials = MOST_TRIALS
        if gap < lower / 2:
            max_trials = TRIALS

        is_close = losses[lower] >= 0.6 * limit or gap < max(lower / 20, 1e-3)
        if is_close or trials >= max_trials:
            return losses
        share = _next_share(losses, limit, lower, upper)


def _next_share(losses: Mapping[float, float], limit: float, lower: float, upper: float) -> float:
    """Return the share to try next, between a share within the limit and a share beyond it, which may be infinite."""
    gap = upper - lower
    if losses.get(upper) == inf:
        return lower + gap / 2

    # Aim a little below the limit, because measurements are noisy.
    nearest, loss, power = _power_law(losses, upper)
    share = nearest * (0.85 * limit / loss) ** (1 / power)
    if upper == inf:
        return min(max(share, 1.2 * lower), 3 * lower, (1 + lower) / 2)

    share = min(share, lower + gap * 4 / 5)
    if lower:
        share = max(share, lower + gap / 5)
    return share


def expected_loss(losses: Mapping[float, float], share: float) -> float:
    """Return the loss with this share removed, by a power law through the nearest measured losses."""
    nearest, loss, power = _power_law(losses, share)
    return float(loss * (share / nearest) ** power)


def _power_law(losses: Mapping[float, float], share: float) -> tuple[float, float, float]:
    """Return the power law near a share.

    Returns:
        The smallest measured share that is at least `share`, or else the largest measured share, with its loss and
        the exponent there.
    """
    # Losses below 1e-4 are noise, and losses above 1 follow no power law.
    clamped = {removed: min(max(loss, 1e-4), 1.0) for removed, loss in losses.items() if removed and loss < inf}
    pairs = list(pairwise(sorted(clamped)))
    if not pairs:
        removed, loss = clamped.popitem()
        return removed, loss, FIRST_POWER

    start, end = next((pair for pair in pairs if pair[1] >= share), pairs[-1])
    power = log(clamped[end] / clamped[start]) / log(end / start)
    return end, clamped[end], max(power, 1.0)
