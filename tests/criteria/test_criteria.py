"""Criteria against their definitions."""

from dataclasses import replace

import pytest
import torch
from models import config

from optimum_structprune.calibration.moments import Moments
from optimum_structprune.criteria import CRITERIA
from optimum_structprune.criteria.mixture import Mixture, output_energy


@pytest.fixture
def case():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 6, generator=generator) @ torch.randn(6, 6, generator=generator) + 1
    return torch.randn(4, 6, generator=generator), x, Moments.empty(6, gram=True).update(x)


def score(name, case, columns_per_unit=1, **fields):
    weight, _, moments = case
    return CRITERIA.get(name)(config(criterion=name, **fields)).score(weight, moments, columns_per_unit)


def test_magnitude(case):
    torch.testing.assert_close(score("magnitude", case), case[0].norm(dim=0))


def test_wanda(case):
    weight, x, _ = case
    torch.testing.assert_close(score("wanda", case), weight.norm(dim=0) * x.square().mean(0).sqrt())


def test_flap(case):
    weight, x, _ = case
    expected = weight.square().sum(0) * x.var(0, correction=0)
    torch.testing.assert_close(score("flap", case), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("columns_per_unit", [1, 2, 3])
def test_obs_is_half_the_error_after_the_best_refit_of_the_others(case, columns_per_unit):
    weight, x, _ = case
    scores = score("obs", case, columns_per_unit, damping=1e-7)
    for unit in range(6 // columns_per_unit):
        others = [j for j in range(6) if j // columns_per_unit != unit]
        target = x @ weight.T
        fitted = x[:, others] @ torch.linalg.lstsq(x[:, others], target).solution
        assert float(scores[unit]) == pytest.approx(0.5 * float((target - fitted).square().sum(1).mean()), rel=1e-2)


def test_a_channel_with_larger_producers_scores_higher(case):
    """And the scores stay in the units of a loss, so that they compare over layers."""
    weight, x, moments = case
    losses = score("obs", case)
    even = score("obs_drive", (weight, x, replace(moments, saliency=torch.ones(6))))
    torch.testing.assert_close(even, (losses.sqrt() + losses.sqrt().mean()).square() / 4)
    norms = torch.tensor([1.0, 1.0, 5.0, 1.0, 1.0, 1.0])
    larger = score("obs_drive", (weight, x, replace(moments, saliency=norms)))
    assert int((larger / even).argmax()) == 2
    scaled = score("obs_drive", (weight, x, replace(moments, saliency=100 * norms)))
    torch.testing.assert_close(scaled, larger)
    # Groups of columns, and units without producer norms, are scored as by `obs`.
    pairs = score("obs_drive", (weight, x, replace(moments, saliency=norms)), 2)
    torch.testing.assert_close(pairs, score("obs", case, 2))
    torch.testing.assert_close(score("obs_drive", case), losses)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("columns", [192, 512])
def test_obs_judges_groups_as_large_as_those_of_real_models(columns, threads):
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(rows, 2 * columns, generator=generator) for rows in (4 * columns, 16))
    moments, before = Moments.empty(2 * columns, gram=True).update(x), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        scores = score("obs", (weight, x, moments), columns, damping=1e-6)
    finally:
        torch.set_num_threads(before)
    for unit, others in ((0, slice(columns, None)), (1, slice(0, columns))):
        target = (x @ weight.T).double()
        fitted = x[:, others].double() @ torch.linalg.lstsq(x[:, others].double(), target).solution
        expected = 0.5 * float((target - fitted).square().sum(1).mean())
        assert float(scores[unit]) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("name", ["magnitude", "wanda"])
def test_a_unit_of_several_columns_scores_their_joint_energy(case, name):
    torch.testing.assert_close(score(name, case, 3), score(name, case).reshape(2, 3).norm(dim=1))


def test_random_follows_the_seed(case):
    assert torch.equal(score("random", case, seed=1), score("random", case, seed=1))
    assert not torch.equal(score("random", case, seed=1), score("random", case, seed=2))


def test_output_energy_is_that_of_the_outputs(case):
    weight, x, moments = case
    assert output_energy(weight, moments) == pytest.approx(float((x @ weight.T).square().sum(1).mean()), rel=1e-4)


def test_a_domain_with_large_activations_does_not_outweigh_the_others(case):
    weight, x, moments = case
    scaled = Moments.empty(6, gram=True).update(100 * x)
    pooled = Mixture((0.5, 0.5)).pool(weight, [moments, scaled])
    # Both are the same text but for the scale, so each has to contribute one half of the pooled energy.
    expected = moments.gram / output_energy(weight, moments)
    torch.testing.assert_close(pooled.gram / output_energy(weight, pooled), expected, rtol=1e-3, atol=1e-5)
