"""Properties of the refits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optimum_structprune.method.calibrate import Moments
from optimum_structprune.method.linalg import ridge_strength, solve_damped
from optimum_structprune.method.refit import least_squares, no_refit


def problem(seed: int, n: int = 12, out: int = 5, count: int = 200):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(n, n, generator=generator)
    x = torch.randn(count, n, generator=generator) @ mix + 0.5
    return torch.randn(out, n, generator=generator), torch.randn(out, generator=generator), x


def correlated(seed: int, n: int, count: int):
    """A weight, shape `(5, n)`, and inputs that share as much as they have of their own, as those of an FFN do."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(count, n // 4, generator=generator) @ torch.randn(n // 4, n, generator=generator)
    own = torch.randn(count, n, generator=generator) * shared.std(0)
    return torch.randn(5, n, generator=generator), shared + own


def moments_of(x: torch.Tensor) -> Moments:
    return Moments.empty(x.shape[1], gram=True).update(x)


def error(weight, bias, x, keep, new_weight, new_bias) -> float:
    dense = x @ weight.T + (0 if bias is None else bias)
    small = x[:, keep] @ new_weight.T + (0 if new_bias is None else new_bias)
    return float((dense - small).square().mean())


@settings(max_examples=30)
@given(seed=st.integers(0, 999), kept=st.integers(1, 11), damping=st.sampled_from([0.0, 1e-4, 1e-2, 1.0]))
@pytest.mark.parametrize("with_bias", [False, True])
def test_least_squares_lowers_the_error(with_bias, seed, kept, damping):
    weight, bias, x = problem(seed)
    bias = bias if with_bias else None
    keep = torch.arange(kept)
    before = error(weight, bias, x, keep, *no_refit(weight, bias, moments_of(x), keep, damping))
    after = error(weight, bias, x, keep, *least_squares(weight, bias, moments_of(x), keep, damping))
    assert after <= before * (1 + 1e-4)


@pytest.mark.parametrize("with_bias", [False, True])
def test_least_squares_is_exact_where_the_removed_depend_on_the_kept(with_bias):
    weight, bias, x = problem(0)
    keep = torch.tensor([0, 2, 3, 5, 7, 8, 11])
    gone = torch.tensor([1, 4, 6, 9, 10])
    x[:, gone] = x[:, keep] @ torch.randn(7, 5) + (1.0 if with_bias else 0.0)
    bias = bias if with_bias else None
    refitted = least_squares(weight, bias, moments_of(x), keep, 1e-7)
    assert error(weight, bias, x, keep, *refitted) < 1e-5


def test_a_single_token_changes_nothing_but_the_bias():
    for seed in range(20):
        weight, bias, x = problem(seed, n=40, count=1)
        keep = torch.arange(24)
        refitted, shift = least_squares(weight, bias, moments_of(x), keep, 0.1)
        assert torch.equal(refitted, weight[:, keep])
        torch.testing.assert_close(x[:, keep] @ refitted.T + shift, x @ weight.T + bias)


def test_strong_damping_returns_the_original_weights_not_zero():
    weight, _, x = problem(4)
    keep = torch.arange(6)
    new, _ = least_squares(weight, None, moments_of(x), keep, 1e6)
    torch.testing.assert_close(new, weight[:, keep], rtol=1e-3, atol=1e-3)
    assert ridge_strength(0.1, 50, 1000) == pytest.approx(0.2), "twice the damping with twenty tokens a column"
    assert ridge_strength(0.1, 50, 10**9) == pytest.approx(0.1) and ridge_strength(0.0, 50, 10) == 0.0
    dead = solve_damped(lambda dtype: torch.zeros(3, 3, dtype=dtype), torch.zeros(3), torch.zeros(2, 3), 1e-2)
    assert (dead == 0).all()


@pytest.mark.parametrize("tokens", [60, 90, 150])
def test_with_few_tokens_a_stronger_ridge_loses_less_on_others(tokens):
    damping, keep, lost = 0.1, torch.arange(40), {True: 0.0, False: 0.0}
    for seed in range(20):
        weight, x = correlated(seed, n=60, count=20_000)
        for grown in (True, False):
            strength = ridge_strength(damping, len(keep), tokens) if grown else damping
            refitted = least_squares(weight, None, moments_of(x[:tokens]), keep, strength)
            lost[grown] += error(weight, None, x[10_000:], keep, *refitted)
    assert lost[True] < 0.95 * lost[False]
