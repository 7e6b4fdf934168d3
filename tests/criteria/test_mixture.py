"""What several domains say, brought together: scales, aggregations, weights from round to round."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import config

from optimum_structprune.calibration.moments import Moments, mix
from optimum_structprune.criteria import CRITERIA
from optimum_structprune.criteria.aggregate import aggregate, normalised
from optimum_structprune.criteria.mixture import Mixture, output_energy
from optimum_structprune.domains.reweight import MOST, reweighted


HOWS = ["none", "energy", "zscore"]
matrices = st.tuples(st.integers(1, 4), st.integers(2, 8), st.integers(0, 2**31)).map(
    lambda case: torch.rand(case[:2], generator=torch.Generator().manual_seed(case[2])) ** 3 + 1e-3
)


def equal_shares(scores):
    return [1 / len(scores)] * len(scores)


@settings(deadline=None, max_examples=50)
@given(scores=matrices, scale=st.floats(1e-3, 1e3), how=st.sampled_from(HOWS))
def test_normalised_keeps_the_order_and_removes_the_scale(scores, scale, how):
    scaled = normalised(scores, how)
    assert torch.equal(scaled.argsort(dim=1, stable=True), scores.argsort(dim=1, stable=True))
    if how == "none":
        assert torch.equal(scaled, scores)
    else:
        torch.testing.assert_close(normalised(scale * scores, how), scaled, rtol=1e-3, atol=1e-3)


def test_normalised_by_hand():
    scores = torch.tensor([[1.0, 3.0, 2.0], [40.0, 0.0, 20.0]])
    assert normalised(scores, "energy").tolist() == [[0.5, 1.5, 1.0], [2.0, 0.0, 1.0]]
    torch.testing.assert_close(normalised(scores, "zscore")[1] * (2 / 3) ** 0.5, torch.tensor([1.0, -1.0, 0.0]))


@pytest.mark.parametrize("how", HOWS)
def test_degenerate_scores_stay_finite_and_small(how):
    flat = torch.full((2, 7), 0.1)
    for scores in (flat, torch.zeros(2, 7), -flat, torch.ones(2, 1)):
        assert normalised(scores, how).abs().max() <= 1.5


@settings(deadline=None, max_examples=40)
@given(scores=matrices, how=st.sampled_from(["mean", "max"]))
def test_domains_that_agree_are_one_domain(scores, how):
    same = scores[:1].expand(3, -1)
    torch.testing.assert_close(aggregate(same, [0.2, 0.3, 0.5], how), scores[0], rtol=1e-4, atol=1e-6)


def test_aggregations_by_hand():
    scores = torch.tensor([[1.0, 4.0, 2.0], [3.0, 0.0, 2.0], [5.0, 8.0, 2.0]])

    def of(how):
        return aggregate(scores, [0.5, 0.25, 0.25], how).tolist()

    assert of("mean") == [2.5, 4.0, 2.0]
    assert of("max") == [5.0, 8.0, 2.0]


@pytest.fixture
def parts():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 6, generator=generator)
    streams = [scale * torch.randn(40, 6, generator=generator) for scale in (1.0, 7.0)]
    return weight, [Moments.empty(6, gram=True).update(stream) for stream in streams]


@pytest.mark.parametrize("name", ["wanda", "flap", "obs", "magnitude"])
@pytest.mark.parametrize("how", ["none", "energy"])
def test_the_mean_of_energies_is_taken_over_moments(parts, name, how):
    weight, moments = parts
    criterion = CRITERIA.get(name)(config(criterion=name))
    weights = [0.3 / (1 if how == "none" else output_energy(weight, moments[0]))]
    weights.append(0.7 / (1 if how == "none" else output_energy(weight, moments[1])))
    pooled = mix(moments, weights)
    mixture = Mixture((0.3, 0.7), normalisation=how)
    torch.testing.assert_close(mixture.pool(weight, moments).gram, pooled.gram)
    torch.testing.assert_close(mixture.scores(criterion, weight, moments, 2), criterion.score(weight, pooled, 2))


@pytest.mark.parametrize("aggregation", ["mean", "max"])
@pytest.mark.parametrize("how", ["zscore"])
def test_all_else_scores_each_domain_by_itself(parts, how, aggregation):
    weight, moments = parts
    wanda = CRITERIA.get("wanda")(config())
    each = normalised(torch.stack([wanda.score(weight, one, 1) for one in moments]), how)
    found = Mixture((0.3, 0.7), how, aggregation).scores(wanda, weight, moments, 1)
    torch.testing.assert_close(found, aggregate(each, [0.3, 0.7], aggregation))


def test_a_domain_that_never_came_here_has_no_say(parts):
    weight, (first, second) = parts
    wanda = CRITERIA.get("wanda")(config())
    for aggregation in ("mean", "max"):
        three = Mixture((0.2, 0.3, 0.5), aggregation=aggregation).scores(
            wanda, weight, [first, Moments.empty(6, gram=True), second], 1
        )
        two = Mixture((2 / 7, 5 / 7), aggregation=aggregation).scores(wanda, weight, [first, second], 1)
        torch.testing.assert_close(three, two)


shares_and_losses = st.integers(1, 5).flatmap(
    lambda n: st.tuples(
        *(st.lists(st.floats(low, high), min_size=n, max_size=n) for low, high in ((0.05, 1), (0.05, 1), (-0.2, 3)))
    )
)


@settings(deadline=None, max_examples=80)
@given(case=shares_and_losses, rate=st.floats(0, 5), objective=st.sampled_from(sorted(MOST)))
def test_shares_sum_to_one_and_stay_near_what_was_asked_for(case, rate, objective):
    asked, losses = [value / sum(case[0]) for value in case[0]], case[2]
    shares = reweighted([value / sum(case[1]) for value in case[1]], asked, losses, rate, objective)
    assert sum(shares) == pytest.approx(1)
    for share, wanted in zip(shares, asked, strict=True):
        assert wanted / MOST[objective] - 1e-9 <= share <= wanted * MOST[objective] + 1e-9


def test_a_domain_that_loses_more_counts_more():
    assert reweighted((0.5, 0.3, 0.2), (0.5, 0.3, 0.2), [0.4, 0.4, 0.4], 3.0, "mean") == pytest.approx((0.5, 0.3, 0.2))
    assert reweighted((0.5, 0.5), (0.5, 0.5), [-0.1, 0.0], 3.0, "mean") == pytest.approx((0.5, 0.5))
    gentle, fast, bold = (
        reweighted((0.5, 0.3, 0.2), (0.5, 0.3, 0.2), [0.1, 0.2, 0.6], rate, objective)
        for rate, objective in ((0.2, "mean"), (2.0, "mean"), (2.0, "worst"))
    )
    assert gentle[0] < 0.5 and 0.2 < gentle[2] < fast[2] < bold[2]
    assert fast[2] == pytest.approx(0.4)  # twice what was asked for, and no more
    unbound = [
        share * torch.e ** (0.2 * (loss / 0.3 - 1)) for share, loss in zip((5, 3, 2), (0.1, 0.2, 0.6), strict=True)
    ]
    assert gentle == pytest.approx([float(value / sum(unbound)) for value in unbound])
