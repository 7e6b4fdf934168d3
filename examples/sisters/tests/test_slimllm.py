"""The widths of `cosine` and the refit of `slope`, as SlimLLM has them."""

import pytest
import torch
from helpers import data_of
from models import build, config, tokenizer
from structprune_sisters.slimllm import SHARPNESS, slope_refit

from optimum_structprune import StructPruneError, StructPruner
from optimum_structprune.arch.load import describe
from optimum_structprune.criteria import block_influence
from optimum_structprune.method.calibrate import Moments
from optimum_structprune.pruning.run import Run
from optimum_structprune.search.search import choose_shape
from optimum_structprune.widths.budget import widths_of


pytestmark = pytest.mark.nightly


def test_layers_give_up_in_proportion_to_the_softmax_of_their_cosine():
    model = build("llama-tied")
    with torch.no_grad():  # the first layer changes the residual stream little
        for module in (model.model.layers[0].mlp.down_proj, model.model.layers[0].self_attn.o_proj):
            module.weight.mul_(0.1)
    settings = config(allocation="cosine", widths={"mlp": 30}, round_to=1)
    data, arch = data_of(settings), describe(model)
    widths = choose_shape(Run(model, arch, data), widths_of(settings, arch, model))
    removed = torch.tensor([40 - width for _, width in sorted(widths["mlp"].items())], dtype=torch.float64)
    by_domain = [[batch for batch in data.own_batches if batch.domain == domain] for domain in (0, 1)]
    lost = torch.stack([block_influence(model, arch, batches) for batches in by_domain]).mean(0)
    expected = torch.softmax(SHARPNESS * (1 - lost), 0)
    assert removed.sum() == 20 and removed[0] > removed[1]
    torch.testing.assert_close(removed / 20, expected, atol=0.05, rtol=0)


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
