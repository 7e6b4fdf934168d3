"""Error feedback: what the refits are told of the dense model's residual stream, and what it brings."""

import pytest
import torch
from helpers import count_hooks
from models import build, config, token_ids, tokenizer
from trained import loss_ratio, needs_shared, stories_model

from optimum_structprune import prune_model
from optimum_structprune.arch.load import describe
from optimum_structprune.calibration.passes import LayerPasses
from optimum_structprune.forward.hooks import observe
from optimum_structprune.forward.layers import Batch


@pytest.mark.parametrize(
    ("case", "mlp"),
    [("llama-tied", 1), ("granite", 0.7), ("gpt_neox", 1), ("opt", 1), ("phi3", 1), ("gemma2", None), ("olmo2", None)],
)
def test_what_goes_straight_into_the_residual_stream_is_found_by_trying(case, mlp):
    model = build(case)
    arch = describe(model)
    passes = LayerPasses(model, arch, [Batch(0, token_ids())], error_feedback=1.0)
    name = arch.of("mlp")[0].into[0].module.removeprefix(arch.layer_prefix(0))
    gain = passes.gain(0, name)
    assert gain == (mlp and pytest.approx(mlp, rel=1e-3)) and count_hooks(model) == 0


@pytest.mark.parametrize(("case", "share"), [("llama-tied", 0.5), ("gemma2", 0.0), ("mixtral", 0.0)])
def test_it_is_off_where_nothing_can_make_up_for_an_error(case, share):
    model = build(case)
    passes = LayerPasses(model, describe(model), [Batch(0, token_ids())], error_feedback=0.5)
    passes.advance_dense(0, ["mlp"])
    assert passes.error_feedback == share and (passes.dense[0] is passes.hidden[0]) == (share == 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moments_hold_the_error_of_the_residual_stream(dtype):
    model = build("granite").to(dtype)
    arch = describe(model)
    passes = LayerPasses(model, arch, [Batch(0, token_ids())], error_feedback=0.25)
    dense = passes.output(0, 0)
    passes.hidden = [hidden + 0.5 for hidden in passes.hidden]
    passes.advance_dense(0, ["mlp"])
    space = next(space for space in arch.at(0) if space.kind == "mlp")
    ((moments,),) = passes.gather(0, space, True)
    inputs = []
    with observe(model, [space.into[0].module], lambda name, x: inputs.append(x.float().flatten(0, 1))):
        error = 0.25 * (dense - passes.output(0, 0)).float().flatten(0, 1) / 0.7
    torch.testing.assert_close(moments.error.mean, error.mean(0), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(moments.error.cross, error.T @ inputs[0] / len(error), rtol=1e-2, atol=1e-2)
    ((plain,),) = LayerPasses(model, arch, [Batch(0, token_ids())]).gather(0, space, True)
    assert plain.error is None


def test_the_gain_does_not_depend_on_the_size_of_a_batch():
    """So several processes, each with a part of the samples, give what one gives."""
    model, ids = build("llama-tied"), token_ids()
    with torch.no_grad():  # of what the attention gives, little comes through the FFN, but some does
        model.model.layers[0].mlp.down_proj.weight.mul_(0.01)
    arch = describe(model)
    name = arch.of("attention")[0].into[0].module.removeprefix(arch.layer_prefix(0))
    gains = []
    for size in (1, 2, len(ids)):
        passes = LayerPasses(model, arch, [Batch(0, part) for part in ids.split(size)], error_feedback=1.0)
        gains.append(passes.gain(0, name))
    assert gains[0] is not None and gains[0] != 1
    assert gains == [pytest.approx(gains[0], rel=1e-6)] * 3


def test_it_is_nothing_where_nothing_was_lost():
    """The first layer sees the dense residual stream, so its refit is the same with and without."""
    model = build("llama-tied")
    with_it, without = (
        prune_model(model, config(widths={"mlp": 24}, error_feedback=share), tokenizer()) for share in (0.5, 0.0)
    )
    first, last = ([m.model.layers[i].mlp.down_proj.weight for m in (with_it, without)] for i in (0, 1))
    torch.testing.assert_close(*first)
    assert not torch.allclose(*last)


def test_rounds_follow_the_dense_residual_stream():
    """Masks and refits of the first round are no part of what the second aims at."""
    model = build("llama-tied")
    once, twice = (prune_model(model, config(widths={"mlp": 39}, rounds=n), tokenizer()) for n in (1, 2))
    for left, right in zip(once.parameters(), twice.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-5)


@needs_shared
def test_it_helps_a_trained_model():
    stories = stories_model()
    more = {"criterion": "obs", "widths": {"mlp": 96}, "num_samples": 64, "seq_length": 128}
    # Measured: 2.93 against 3.18.
    assert loss_ratio(stories, **more) < 0.97 * loss_ratio(stories, **more, error_feedback=0.0)
