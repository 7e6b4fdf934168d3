"""Properties of the refits."""

import pytest
import torch

from optimum_structprune.method.calibrate import Moments
from optimum_structprune.method.refit import least_squares, ridge_strength, solve_damped


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
            refitted, _ = least_squares(weight, None, moments_of(x[:tokens]), keep, strength)
            lost[grown] += float((x[10_000:] @ weight.T - x[10_000:, keep] @ refitted.T).square().mean())
    assert lost[True] < 0.95 * lost[False]
