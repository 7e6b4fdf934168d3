"""Margins of error contain the true values nine times in ten."""

from math import exp, hypot, isnan

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optimum_structprune.record.figures import perplexity_result
from optimum_structprune.system.margins import (
    KINDS_DIFFER,
    MIN_RELATIVE_MARGIN,
    interval_of_median,
    margin_of_error,
)


def random_losses(documents: int, rows: int, spread: float) -> torch.Tensor:
    """Return log-normal losses. Three quarters of the variance are common to the rows of a document."""
    of_documents = torch.randn(documents, 1, dtype=torch.float64) * 0.75**0.5
    of_rows = torch.randn(documents, rows) * 0.25**0.5
    return 0.1 * (spread * (of_documents + of_rows)).exp().flatten()


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize(
    ("documents", "spread"), [(2, 0.3), (3, 0.3), (4, 0.3), (12, 0.5), (18, 0.7), (36, 0.7), (72, 1.0)]
)
def test_the_margin_covers_the_true_mean_nine_times_in_ten(documents, rows, spread):
    torch.manual_seed(0)
    true_mean = 0.1 * exp(spread**2 / 2)
    numbers = torch.arange(documents).repeat_interleave(rows)
    trials = 400
    samples = [random_losses(documents, rows, spread) for _ in range(trials)]

    covered = sum(abs(sample.mean() - true_mean) <= margin_of_error(sample, numbers) for sample in samples)
    # The standard error of the share is 0.015 with 400 trials.
    assert 0.87 <= covered / trials <= 0.97

    if rows > 1:
        # The margin is too small if each row counts as a document.
        covered_by_rows = sum(abs(sample.mean() - true_mean) <= margin_of_error(sample) for sample in samples)
        assert covered_by_rows < covered - trials / 10


@given(st.lists(st.floats(-1, 3), min_size=2, max_size=20), st.randoms())
def test_values_of_one_document_count_as_one_in_any_order(values, shuffler):
    values = torch.tensor(values, dtype=torch.float64)
    numbers = list(range(len(values))) * 3
    shuffler.shuffle(numbers)

    repeated = margin_of_error(values[numbers], torch.tensor(numbers))
    assert repeated == pytest.approx(margin_of_error(values), rel=1e-6, abs=1e-9)


def test_a_single_document_has_no_margin():
    values = torch.randn(40)
    assert isnan(margin_of_error(values[:1]))

    result = perplexity_result({"original": values, "pruned": values + 1}, 40, torch.arange(40) // 40)
    assert result.perplexity.margin is None
    assert result.documents == 1


def test_equal_values_have_a_margin_of_zero():
    assert margin_of_error(torch.ones(9)) == 0


def test_a_ratio_without_any_loss_has_a_margin():
    losses = torch.randn(12, dtype=torch.float64)
    result = perplexity_result({"original": losses, "pruned": losses}, 12, torch.arange(12))

    assert result.perplexity.margin == pytest.approx(MIN_RELATIVE_MARGIN / 12)


def test_a_ratio_for_other_kinds_of_text_has_a_wider_margin():
    original_losses = torch.randn(12, dtype=torch.float64)
    numbers = torch.arange(12)
    for increase in (0.1, 0.5):
        losses = {"original": original_losses, "pruned": original_losses + increase}
        margin = perplexity_result(losses, 12, numbers, 0.0).perplexity.margin
        wider_margin = perplexity_result(losses, 12, numbers, KINDS_DIFFER).perplexity.margin

        assert hypot(margin, KINDS_DIFFER * (exp(increase) - 1)) == pytest.approx(wider_margin)


def test_the_interval_of_a_median_contains_it_as_often_as_stated():
    generator = torch.Generator().manual_seed(0)
    for count in (5, 8, 15):
        hits = 0
        for _ in range(1000):
            values = torch.randn(count, generator=generator).exp()  # the median is 1
            low, high = interval_of_median(values.tolist())
            hits += low <= 1 <= high
        assert 890 <= hits <= 980, count
    assert interval_of_median([2.0]) == (2.0, 2.0)
    assert interval_of_median(list(range(15))) == (3, 11)
