"""A margin of error covers the truth nine times in ten, over documents and not over what they are cut into."""

from math import exp, hypot, isnan

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optimum_structprune.domains.packing import document_numbers
from optimum_structprune.forward.metrics import KINDS_DIFFER, UNSEEN, margin_of_error, perplexity_figures


def losses(documents: int, rows: int, spread: float) -> torch.Tensor:
    """How much more a smaller model loses, in rows of documents: the logarithm is normal, and rows of one document
    share three quarters of its variance, so that a few documents lose most.
    """
    own = torch.randn(documents, 1, dtype=torch.float64) * 0.75**0.5 + torch.randn(documents, rows) * 0.25**0.5
    return 0.1 * (spread * own).exp().flatten()


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize(
    ("documents", "spread"), [(2, 0.3), (3, 0.3), (4, 0.3), (12, 0.5), (18, 0.7), (36, 0.7), (72, 1.0)]
)
def test_it_covers_the_truth_nine_times_in_ten(documents, rows, spread):
    torch.manual_seed(0)
    truth, numbers, trials = 0.1 * exp(spread**2 / 2), torch.arange(documents).repeat_interleave(rows), 400
    samples = [losses(documents, rows, spread) for _ in range(trials)]
    covered = [abs(of.mean() - truth) <= margin_of_error(of, numbers) for of in samples]
    # Of 400 trials, the share is off by 0.015 itself.
    assert 0.87 <= sum(covered) / trials <= 0.97
    if rows > 1:  # over rows it claims too much
        assert sum(abs(of.mean() - truth) <= margin_of_error(of) for of in samples) < sum(covered) - trials / 10


@given(st.lists(st.floats(-1, 3), min_size=2, max_size=20), st.randoms())
def test_values_of_one_document_count_as_one_in_any_order(values, random):
    each = torch.tensor(values, dtype=torch.float64)
    numbers = [number for number in range(len(values)) for _ in range(3)]
    random.shuffle(numbers)
    repeated = margin_of_error(each[numbers], torch.tensor(numbers))
    assert repeated == pytest.approx(margin_of_error(each), rel=1e-6, abs=1e-9)


def test_one_document_has_none_and_values_that_are_alike_have_none_to_speak_of():
    values = torch.randn(40)
    assert isnan(margin_of_error(values[:1])) and margin_of_error(torch.ones(9)) == 0
    found = perplexity_figures({"before": values, "after": values + 1}, 40, torch.arange(40) // 40)
    assert all(map(isnan, found["perplexity_margin"].values())) and found["perplexity_documents"] == 1


def test_a_ratio_has_a_margin_where_nothing_was_lost_and_a_wider_one_where_it_stands_for_other_kinds():
    before, numbers = torch.randn(12, dtype=torch.float64), torch.arange(12)
    same = perplexity_figures({"before": before, "after": before}, 12, numbers)["perplexity_margin"]["ratio"]
    assert same == pytest.approx(UNSEEN / 12)
    for more in (0.1, 0.5):
        losses = {"before": before, "after": before + more}
        own, other = (perplexity_figures(losses, 12, numbers, other)["perplexity_margin"]["ratio"] for other in (0, 1))
        assert hypot(own, KINDS_DIFFER * (exp(more) - 1)) == pytest.approx(other)


def test_tokens_are_of_the_document_that_ends_behind_them():
    samples = torch.tensor([[1, 5, 5, 2, 6], [1, 6, 6, 6, 6], [1, 6, 2, 7, 2]])
    numbers = document_numbers(samples, 2)
    assert numbers.tolist() == [[0, 0, 0, 1, 1], [1, 1, 1, 1, 1], [1, 1, 2, 2, 3]]
    assert document_numbers(samples, None)[:, 0].tolist() == [0, 1, 2]
