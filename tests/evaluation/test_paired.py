"""Whether two models differ on the same items."""

from math import comb

import pytest
import torch

from optimum_structprune.evaluation.paired import paired


def test_the_test_of_mcnemar_is_its_definition():
    for better, worse in [(0, 0), (3, 3), (1, 4), (1, 12), (12, 1)]:
        scores = [(1.0, 0.0)] * better + [(0.0, 1.0)] * worse + [(1.0, 1.0)] * 5
        found = paired(*(dict(enumerate(score[at] for score in scores)) for at in (0, 1)))
        apart = better + worse
        tail = sum(comb(apart, k) for k in range(min(better, worse) + 1)) / 2**apart
        assert found.p_value == pytest.approx(min(1, 2 * tail)) and (found.better, found.worse) == (better, worse)
        assert found.verdict == ("alike" if found.p_value >= 0.05 else "better" if better > worse else "worse")


def test_scores_that_are_no_yes_or_no_are_compared_by_their_differences():
    dense = {item: item / 40 for item in range(40)}
    noise = torch.randn(40, generator=torch.Generator().manual_seed(0)) / 100
    lower = {item: score - 0.02 + float(noise[item]) for item, score in dense.items()}
    alike = {item: score + float(noise[item]) for item, score in dense.items()}
    assert [paired(one, dense).verdict for one in (lower, alike, dense)] == ["worse", "alike", "alike"]
    with pytest.raises(ValueError, match="39 and 40 items"):
        paired({item: lower[item] for item in range(39)}, dense)
