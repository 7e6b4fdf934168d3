"""Margins of error of measured values: 90 % confidence intervals, over documents or over repetitions."""

from __future__ import annotations

from collections.abc import Sequence
from math import comb, nan
from statistics import NormalDist

from torch import Tensor


# Margins over fewer documents than `MIN_DOCUMENTS` are wide, and over fewer than `MANY_DOCUMENTS` they are rough.
MIN_DOCUMENTS = 5
MANY_DOCUMENTS = 12
# The quantiles of Student's t at 0.95 for few degrees of freedom, where `_student_t` would be off by more than 2 %.
STUDENT_T = {1: 6.31, 2: 2.92}
# The lower bound of the margin of a ratio, times the number of documents. The sample may miss rare documents.
MIN_RELATIVE_MARGIN = 0.12
# The relative spread of the loss between kinds of text.
KINDS_DIFFER = 0.5
# The relative spread of the loss between whole documents and their first tokens.
PARTS_DIFFER = 0.25


def margin_of_error(values: Tensor, documents: Tensor | None = None, quantile: float = 0.95) -> float:
    """Return the half-width of the confidence interval of a mean, 90 % by default, or NaN for a single document.

    It is t · s / √n plus a correction for skewed documents (Johnson, JASA 1978, 73:536), because a few documents may
    have a large loss. t is the quantile of Student's distribution.

    Args:
        values: The values, shape `(values,)`.
        documents: The number of each value's document, shape `(values,)`. Documents are independent. By default each
            value has its own document.
        quantile: The quantile at the upper end of the interval.
    """
    deviations = values.double() - values.double().mean()
    count = len(values)
    if documents is not None:
        # The contribution of each document to the mean. If all documents have the same number of values, it is the
        # mean of the document.
        index = documents.unique(return_inverse=True)[1].to(deviations.device)
        sums = deviations.new_zeros(int(index.max()) + 1).index_add(0, index, deviations)
        deviations = sums * len(sums) / count
        count = len(sums)

    if count < 2:
        return nan

    t = _student_t(count - 1, quantile)
    third_moment = (deviations.pow(3).mean() / deviations.var()).nan_to_num(0.0, 0.0, 0.0).abs()
    skewness = third_moment * (1 + 2 * t**2) / (6 * count)
    return float(t * deviations.std() / count**0.5 + skewness)


def _student_t(freedom: int, quantile: float) -> float:
    """Return a quantile of Student's t, expanded in 1/freedom (Abramowitz and Stegun 26.7.5)."""
    z = NormalDist().inv_cdf(quantile)
    expansion = z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
    return max(STUDENT_T.get(freedom, expansion), expansion)


def interval_of_median(values: Sequence[float], level: float = 0.9) -> tuple[float, float]:
    """Return the confidence interval of the median of a distribution, between two of the values.

    The number of values below the median has a binomial distribution. The ends are the values of the highest rank,
    from below and from above, between which the median lies with a probability of at least `level`. Four values or
    fewer are too few for 90 %, and the ends are the smallest and the largest value.
    """
    ordered = sorted(values)
    count = len(ordered)
    rank = 0
    outside = 2 / 2**count
    while outside + 2 * comb(count, rank + 1) / 2**count <= 1 - level:
        rank += 1
        outside += 2 * comb(count, rank) / 2**count
    return ordered[rank], ordered[-1 - rank]
