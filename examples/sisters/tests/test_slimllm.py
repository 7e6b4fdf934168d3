"""The refit of `slope`, as SlimLLM has it."""

import pytest
import torch
from models import build, config, tokenizer
from structprune_sisters.slimllm import slope_refit

from optimum_structprune import StructPruneError, StructPruner
from optimum_structprune.method.calibrate import Moments


pytestmark = pytest.mark.nightly


def test_the_slope_is_no_refit_of_what_is_read_all_over_the_model():
    fields = config(refit="slope", widths={"hidden": 24})
    with pytest.raises(StructPruneError, match="refit='slope' is for consumers inside the layers"):
        StructPruner(fields).prune_model(build("llama-tied"), tokenizer())


def problem(seed: int, n: int = 12, out: int = 5, count: int = 200):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(n, n, generator=generator)
    x = torch.randn(count, n, generator=generator) @ mix + 0.5
    return torch.randn(out, n, generator=generator), torch.randn(out, generator=generator), x


def moments_of(x: torch.Tensor) -> Moments:
    return Moments.empty(x.shape[1], gram=True).update(x)


@pytest.mark.parametrize("with_bias", [False, True])
def test_the_slope_is_the_regression_of_every_output(with_bias):
    weight, bias, x = problem(5)
    bias, keep = bias if with_bias else None, torch.arange(7)
    new, new_bias = slope_refit(weight, bias, moments_of(x), keep, 0.1)
    assert (new_bias is None) == (bias is None)
    for i in range(5):
        pruned, dense = (x[:, keep] @ weight[i, keep])[:, None], x @ weight[i]
        pruned = torch.cat([pruned, torch.ones_like(pruned)], 1) if with_bias else pruned
        slope, *shift = torch.linalg.lstsq(pruned, dense[:, None]).solution.flatten().tolist()
        torch.testing.assert_close(new[i], slope * weight[i, keep], rtol=1e-3, atol=1e-4)
        if shift:
            assert float(new_bias[i] - bias[i]) == pytest.approx(shift[0], rel=1e-2, abs=1e-2)


def test_an_output_that_is_gone_has_no_slope():
    weight, _, x = problem(5)
    weight[2, :7] = 0
    new, _ = slope_refit(weight, None, moments_of(x), torch.arange(7), 0.1)
    assert new.isfinite().all() and not new[2].any()
