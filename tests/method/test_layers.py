"""Layer by layer and whole model see the same; hooks are gone on every way out."""

import pytest
import torch
from helpers import batches, count_hooks, data_of, logits, pruned_on, whole_model_at_once
from models import STRUCTURES, build, config, token_ids, tokenizer
from torch import nn

from optimum_structprune import prune_model
from optimum_structprune.arch.hooks import hidden_states_of, intercept, observe
from optimum_structprune.arch.load import describe
from optimum_structprune.arch.meta import shrunk_skeleton
from optimum_structprune.arch.modules import layer_list
from optimum_structprune.criteria.reap import reap
from optimum_structprune.method.layers import Batch, InMemory, NotSequentialError, capture, gain_of, run_model
from optimum_structprune.method.loop import prune_layers_
from optimum_structprune.method.shrink import Masks
from optimum_structprune.sources.data import source_of
from optimum_structprune.sources.experts import contributions
from optimum_structprune.sources.whole_model import WholeModel
from optimum_structprune.steps.layers import Norm


SEQUENTIAL = [*STRUCTURES, "bert", "modernbert", "llava"]


@pytest.mark.parametrize(
    ("case", "fixed"), [*((case, True) for case in SEQUENTIAL), ("llama-bias", False), ("gpt_oss", False)]
)
def test_layer_by_layer_equals_whole_model(case, fixed):
    model, text = build(case), [*batches(), Batch(1, token_ids(3, 20))]  # inputs may differ in length
    arch = describe(model)
    layers = source_of(model, arch, text, fixed=fixed)
    with whole_model_at_once():
        whole = source_of(model, arch, text)
    assert isinstance(source_of(model, arch, text), InMemory)
    for layer in range(arch.num_layers):
        for space in arch.at(layer):
            if not space.inside:
                by_layer, at_once = (contributions(each, space, reap) for each in (layers, whole))
                torch.testing.assert_close(by_layer, at_once)
                continue
            for left, right in zip(layers.moments(layer, space, True), whole.moments(layer, space, True), strict=True):
                for mine, theirs in zip(left, right, strict=True):
                    assert mine.count == theirs.count and (mine.count > 0 or space.experts)
                    torch.testing.assert_close(mine.gram, theirs.gram, rtol=1e-4, atol=1e-5)
                    torch.testing.assert_close(mine.mean, theirs.mean, rtol=1e-4, atol=1e-5)
        layers.advance(layer)
    assert count_hooks(model) == 0


class Between(nn.ModuleList):
    """Stands in for an architecture that works on the hidden states between its layers."""

    def __getitem__(self, index):
        if isinstance(index, int):
            return super().__getitem__(index)
        return [lambda hidden, layer=layer, **kwargs: layer(hidden + 1, **kwargs) for layer in self]


@pytest.mark.parametrize("case", ["gemma4_text", "gemma4_text-experts"])
def test_a_family_whose_layers_get_more_than_hidden_states_falls_back(case):
    model = build(case)
    arch = describe(model)
    with pytest.raises(NotSequentialError, match="called with more than hidden states"):
        InMemory(model, arch, batches())
    assert isinstance(source_of(model, arch, batches()), WholeModel) and count_hooks(model) == 0
    source = source_of(model, arch, batches())
    for space in arch.spaces:
        for by_domain in source.moments(space.layer, space, True) if space.inside else ():
            assert sum(moments.count for moments in by_domain) > 0
    assert count_hooks(model) == 0


def test_a_model_that_works_between_its_layers_is_pruned():
    """From the whole model, as it is in every step."""
    model = build("llama-tied")
    model.model.layers = Between(model.model.layers)
    with pytest.raises(NotSequentialError, match="between layers 0 and 1"):
        capture(model, describe(model), batches()[0].ids, all_layers=True)
    small = pruned_on(data_of(config(rounds=2)), model, {"mlp": 24}).model
    assert small.config.intermediate_size == 24 and count_hooks(small) == 0
    both = (pruned_on(data_of(config(refit=refit)), model, {"mlp": 24}) for refit in ("least_squares", "none"))
    refitted, plain = ((logits(run.model) - logits(model)).norm() for run in both)
    assert refitted < plain


@pytest.mark.parametrize("case", STRUCTURES)
def test_the_next_layer_gets_what_the_smaller_model_gives(case):
    model, data = build(case), data_of(config())
    arch = describe(model)
    widths = {"mlp": arch.of("mlp")[0].width // 2}
    source = source_of(model, arch, data.own_batches, data.config.feedback_share)
    smaller = shrunk_skeleton(model, arch, widths)
    prune_layers_(Masks(model, arch, undoable=False), source, data.method(model, arch), widths, smaller)
    entering = []
    last = layer_list(model, arch)[-1]
    with intercept([last], lambda _, args, kwargs: entering.append(hidden_states_of(args, kwargs))), torch.no_grad():
        for batch in source.batches:
            run_model(model, batch.ids)
    for hidden, expected in zip(source.hidden, entering, strict=True):
        torch.testing.assert_close(hidden, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("case", "mlp"),
    [("llama-tied", 1), ("granite", 0.7), ("gpt_neox", 1), ("opt", 1), ("phi3", 1), ("gemma2", None), ("olmo2", None)],
)
def test_what_goes_straight_into_the_residual_stream_is_found_by_trying(case, mlp):
    model = build(case)
    arch = describe(model)
    source = InMemory(model, arch, [Batch(0, token_ids())], error_feedback=1.0)
    gain = gain_of(source, 0, arch.of("mlp")[0].consumers[0].module.removeprefix(arch.layer_prefix(0)))
    assert gain == (mlp and pytest.approx(mlp, rel=1e-3)) and count_hooks(model) == 0


@pytest.mark.parametrize(("case", "plus"), [("gemma2", 1), ("olmo2", 0)])
def test_the_norm_behind_a_module_is_found_by_trying(case, plus):
    model = build(case)
    arch = describe(model)
    norm = layer_list(model, arch)[0].post_feedforward_layernorm
    nn.init.normal_(norm.weight, 1.0, 0.3)
    source = InMemory(model, arch, [Batch(0, token_ids())], error_feedback=0.25)
    source.find_other_path, source.hidden = Norm.after_module, [hidden + 0.5 for hidden in source.hidden]
    source.advance_dense(0, ["mlp"])
    space = next(space for space in arch.at(0) if space.kind == "mlp")
    path = source.residual_path(0, space.consumers[0].module)
    assert model.get_submodule(path.module) is norm and count_hooks(model) == 0
    torch.testing.assert_close(path.weight, norm.weight.detach() + plus, rtol=1e-2, atol=1e-2)
    ((moments,),) = source.moments(0, space, True)
    error, inputs, products = 0.25 * (source.dense[0] - source.output(0, 0)).flatten(0, 1), [], []
    with observe(model, [space.consumers[0].module], lambda _, x: inputs.append(x)), torch.no_grad():
        with observe(norm, [""], lambda _, y: products.append(y)):
            source.output(0, 0)
    # The refit is told of what is in front of the norm, relative to the size by which the norm divides.
    x, size = inputs[0].flatten(0, 1), products[0].flatten(0, 1).square().mean(-1, keepdim=True).sqrt()
    fitted, before, _ = path.to_fit(x, error, products[0].flatten(0, 1))
    torch.testing.assert_close(fitted, x / size)
    expected = before.T @ fitted / len(x)
    torch.testing.assert_close(moments.error_cross, expected.detach(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("case", "share"), [("llama-tied", 0.5), ("gemma2", 0.0), ("mixtral", 0.0)])
def test_it_is_off_where_nothing_can_make_up_for_an_error(case, share):
    model = build(case)
    source = InMemory(model, describe(model), [Batch(0, token_ids())], error_feedback=0.5)
    source.advance_dense(0, ["mlp"])
    assert source.error_feedback == share and (source.dense[0] is source.hidden[0]) == (share == 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moments_hold_the_error_of_the_residual_stream(dtype):
    model = build("granite").to(dtype)
    arch = describe(model)
    source = InMemory(model, arch, [Batch(0, token_ids())], error_feedback=0.25)
    dense = source.output(0, 0)
    source.hidden = [hidden + 0.5 for hidden in source.hidden]
    source.advance_dense(0, ["mlp"])
    space = next(space for space in arch.at(0) if space.kind == "mlp")
    ((moments,),) = source.moments(0, space, True)
    inputs = []
    with observe(model, [space.consumers[0].module], lambda name, x: inputs.append(x.float().flatten(0, 1))):
        error = 0.25 * (dense - source.output(0, 0)).float().flatten(0, 1) / 0.7
    torch.testing.assert_close(moments.error_mean, error.mean(0), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(moments.error_cross, error.T @ inputs[0] / len(error), rtol=1e-2, atol=1e-2)
    ((plain,),) = InMemory(model, arch, [Batch(0, token_ids())]).moments(0, space, True)
    assert plain.error_mean is None


def test_the_gain_does_not_depend_on_the_size_of_a_batch():
    """So several processes, each with a part of the samples, give what one gives."""
    model, ids = build("llama-tied"), token_ids()
    with torch.no_grad():  # of what the attention gives, little comes through the FFN, but some does
        model.model.layers[0].mlp.down_proj.weight.mul_(0.01)
    arch = describe(model)
    name = arch.of("attention")[0].consumers[0].module.removeprefix(arch.layer_prefix(0))
    gains = []
    for size in (1, 2, len(ids)):
        source = InMemory(model, arch, [Batch(0, part) for part in ids.split(size)], error_feedback=1.0)
        gains.append(gain_of(source, 0, name))
    assert gains[0] is not None and gains[0] != 1
    assert gains == [pytest.approx(gains[0], rel=1e-6)] * 3


def test_it_is_nothing_where_nothing_was_lost_and_rounds_follow_the_dense_residual_stream():
    """The first layer sees the dense residual stream, so its refit is the same with and without."""
    model = build("llama-tied")
    with_it, without = (prune_model(model, config(error_feedback=share), tokenizer()) for share in (0.5, 0.0))
    first, last = ([m.model.layers[i].mlp.down_proj.weight for m in (with_it, without)] for i in (0, 1))
    torch.testing.assert_close(*first)
    assert not torch.allclose(*last)
    # Masks and refits of the first round are no part of what the second aims at.
    once, twice = (prune_model(model, config(widths={"mlp": 39}, rounds=n), tokenizer()) for n in (1, 2))
    for left, right in zip(once.parameters(), twice.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-5)
