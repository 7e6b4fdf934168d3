"""The refit `slope` of SlimLLM."""

import pytest
import torch
from models import build, config, tokenizer
from structprune_sisters.slimllm import slope_refit

from optimum_structprune import StructPruneError, StructPruner
from optimum_structprune.method.calibrate import Moments


pytestmark = pytest.mark.nightly


def test_the_slope_is_refused_for_channels_of_the_whole_model():
    fields = config(refit="slope", widths={"hidden": 24})
    with pytest.raises(StructPruneError, match="refit='slope' is for consumers inside the layers"):
        StructPruner(fields).prune_model(build("llama-tied"), tokenizer())


def random_problem(seed: int, n: int = 12, out: int = 5, count: int = 200):
    """Return a weight, a bias, and correlated inputs of a nonzero mean."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(n, n, generator=generator)
    x = torch.randn(count, n, generator=generator) @ mix + 0.5
    weight = torch.randn(out, n, generator=generator)
    bias = torch.randn(out, generator=generator)
    return weight, bias, x


def moments_of(x: torch.Tensor) -> Moments:
    return Moments.empty(x.shape[1], gram=True).update(x)


def regression(pruned: torch.Tensor, original: torch.Tensor, with_intercept: bool) -> list[float]:
    """Return the slope of the regression of original outputs on pruned outputs, and the intercept if there is one."""
    columns = [pruned]
    if with_intercept:
        columns.append(torch.ones_like(pruned))
    return torch.linalg.lstsq(torch.stack(columns, 1), original[:, None]).solution.flatten().tolist()


@pytest.mark.parametrize("with_bias", [False, True])
def test_the_slope_is_the_regression_of_every_output(with_bias):
    weight, bias, x = random_problem(5)
    if not with_bias:
        bias = None
    keep = torch.arange(7)

    refitted, new_bias = slope_refit(weight, bias, moments_of(x), keep, 0.1)

    assert (new_bias is None) == (bias is None)
    for i in range(5):
        coefficients = regression(x[:, keep] @ weight[i, keep], x @ weight[i], with_bias)
        torch.testing.assert_close(refitted[i], coefficients[0] * weight[i, keep], rtol=1e-3, atol=1e-4)
        if with_bias:
            assert float(new_bias[i] - bias[i]) == pytest.approx(coefficients[1], rel=1e-2, abs=1e-2)


def test_an_output_that_is_zero_after_pruning_remains_zero():
    weight, _, x = random_problem(5)
    weight[2, :7] = 0

    refitted, _ = slope_refit(weight, None, moments_of(x), torch.arange(7), 0.1)

    assert refitted.isfinite().all()
    assert not refitted[2].any()
