"""What several domains say, brought together: scales, silent domains, weights from round to round."""

from copy import deepcopy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import config

from optimum_structprune.calibration.moments import Moments, mix
from optimum_structprune.criteria import CRITERIA
from optimum_structprune.criteria.mixture import Mixture, output_energy
from optimum_structprune.domains.resolve import MOST, reweighted


matrices = st.tuples(st.integers(1, 4), st.integers(2, 8), st.integers(0, 2**31)).map(
    lambda case: torch.rand(case[:2], generator=torch.Generator().manual_seed(case[2])) ** 3 + 1e-3
)


@settings(deadline=None, max_examples=40)
@given(contributions=matrices, scale=st.floats(1e-3, 1e3))
def test_domains_that_agree_are_one_domain_whatever_their_scale(contributions, scale):
    alone = Mixture((1.0,)).combined(contributions[:1])
    same = contributions[:1].expand(3, -1) * torch.tensor([[1.0], [scale], [1.0]])
    torch.testing.assert_close(Mixture((0.2, 0.3, 0.5)).combined(same), alone, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("flat", [0.1, 0.0, -0.1])
def test_contributions_that_are_all_alike_stay_finite_and_small(flat):
    assert Mixture((0.5, 0.5)).combined(torch.full((2, 7), flat)).abs().max() <= 1.5


def scores_of(mixture, criterion, weight, moments, columns_per_unit=1):
    return criterion.score(weight, mixture.pool(weight, map(deepcopy, moments)), columns_per_unit)


@pytest.fixture
def parts():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 6, generator=generator)
    streams = [scale * torch.randn(40, 6, generator=generator) for scale in (1.0, 7.0)]
    return weight, [Moments.empty(6, gram=True).update(stream) for stream in streams]


@pytest.mark.parametrize("name", ["wanda", "flap", "obs", "magnitude"])
def test_the_mean_of_energies_is_taken_over_moments(parts, name):
    weight, moments = parts
    criterion = CRITERIA.get(name)(config(criterion=name))
    shares = zip((0.3, 0.7), moments, strict=True)
    expected = mix(moments, [share / output_energy(weight, part) for share, part in shares])
    mixture = Mixture((0.3, 0.7))
    torch.testing.assert_close(mixture.pool(weight, moments).gram, expected.gram)
    torch.testing.assert_close(scores_of(mixture, criterion, weight, moments, 2), criterion.score(weight, expected, 2))


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_domain_that_never_came_here_has_no_say(parts, place):
    weight, moments = parts
    wanda, shares = CRITERIA.get("wanda")(config()), [2 / 7, 5 / 7]
    two = scores_of(Mixture(tuple(shares)), wanda, weight, moments)
    for silent in (Moments.empty(6, gram=True), Moments.empty(6, gram=True).update(torch.zeros(9, 6))):
        parts_of_three, shares_of_three = [*moments], [0.7 * share for share in shares]
        parts_of_three.insert(place, silent)
        shares_of_three.insert(place, 0.3)
        three = scores_of(Mixture(tuple(shares_of_three)), wanda, weight, parts_of_three)
        torch.testing.assert_close(three, two)


shares_and_losses = st.integers(1, 5).flatmap(
    lambda n: st.tuples(
        *(st.lists(st.floats(low, high), min_size=n, max_size=n) for low, high in ((0.05, 1), (0.05, 1), (-0.2, 3)))
    )
)


@settings(deadline=None, max_examples=80)
@given(case=shares_and_losses)
def test_shares_sum_to_one_and_stay_near_what_was_asked_for(case):
    asked, losses = [value / sum(case[0]) for value in case[0]], case[2]
    shares = reweighted([value / sum(case[1]) for value in case[1]], asked, losses)
    assert sum(shares) == pytest.approx(1)
    for share, weight in zip(shares, asked, strict=True):
        assert weight / MOST - 1e-9 <= share <= weight * MOST + 1e-9


def test_a_domain_that_loses_more_counts_more():
    assert reweighted((0.5, 0.3, 0.2), (0.5, 0.3, 0.2), [0.4, 0.4, 0.4]) == pytest.approx((0.5, 0.3, 0.2))
    assert reweighted((0.5, 0.5), (0.5, 0.5), [-0.1, 0.0]) == pytest.approx((0.5, 0.5))
    slightly, much = (reweighted((0.5, 0.3, 0.2), (0.5, 0.3, 0.2), losses) for losses in ([2, 3, 4], [1, 2, 60]))
    assert slightly[0] < 0.5 and 0.2 < slightly[2] < much[2]
    assert much[2] == pytest.approx(0.4)  # twice what was asked for, and no more
    unbound = [share * torch.e ** (loss / 3 - 1) for share, loss in zip((5, 3, 2), (2, 3, 4), strict=True)]
    assert slightly == pytest.approx([float(value / sum(unbound)) for value in unbound])
