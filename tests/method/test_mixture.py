"""The mixture of the domains: each is divided by its energy, and one that says nothing has no say."""

from itertools import product

import pytest
import torch
from helpers import mix, mixture_of, weighed
from hypothesis import given, settings
from hypothesis import strategies as st
from models import config

from optimum_structprune.criteria import CRITERIA
from optimum_structprune.method.calibrate import Moments, output_energy


matrices = st.tuples(st.integers(1, 4), st.integers(2, 8), st.integers(0, 2**31)).map(
    lambda case: torch.rand(case[:2], generator=torch.Generator().manual_seed(case[2])) ** 3 + 1e-3
)


@settings(max_examples=40)
@given(contributions=matrices, scale=st.floats(1e-3, 1e3))
def test_domains_that_agree_are_one_domain_whatever_their_scale(contributions, scale):
    alone = weighed(1.0).combined(contributions[:1])
    same = contributions[:1].expand(3, -1) * torch.tensor([[1.0], [scale], [1.0]])
    torch.testing.assert_close(weighed(0.2, 0.3, 0.5).combined(same), alone, rtol=1e-3, atol=1e-5)


def scores_of(shares, criterion, weight, moments, columns_per_unit=1):
    return criterion(weight, mixture_of(moments, shares, weight), columns_per_unit, config())


@pytest.fixture
def parts():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 6, generator=generator)
    streams = [scale * torch.randn(40, 6, generator=generator) for scale in (1.0, 7.0)]
    return weight, [Moments.empty(6, gram=True).update(stream) for stream in streams]


@pytest.mark.parametrize("name", ["wanda", "flap", "obs", "magnitude"])
def test_the_mean_of_energies_is_taken_over_moments(parts, name):
    weight, moments = parts
    criterion = CRITERIA.get(name)
    shares = zip((0.3, 0.7), moments, strict=True)
    expected = mix(moments, [share / output_energy(weight, part) for share, part in shares])
    torch.testing.assert_close(mixture_of(moments, (0.3, 0.7), weight).gram, expected.gram)
    found = scores_of((0.3, 0.7), criterion, weight, moments, 2)
    torch.testing.assert_close(found, criterion(weight, expected, 2, config()))


def test_a_domain_that_never_came_here_has_no_say(parts):
    weight, moments = parts
    wanda, shares = CRITERIA.get("wanda"), [2 / 7, 5 / 7]
    two = scores_of(shares, wanda, weight, moments)
    silent = Moments.empty(6, gram=True), Moments.empty(6, gram=True).update(torch.zeros(9, 6))
    for place, part in product(range(3), silent):
        of_three, shares_of_three = [*moments], [0.7 * share for share in shares]
        of_three.insert(place, part)
        shares_of_three.insert(place, 0.3)
        torch.testing.assert_close(scores_of(shares_of_three, wanda, weight, of_three), two)
