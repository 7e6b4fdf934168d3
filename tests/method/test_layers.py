"""Single layers see the same activations as the whole model, and error feedback follows the original stream."""

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
from optimum_structprune.method.expert_source import contributions
from optimum_structprune.method.layers import Batch, InMemory, NotSequentialError, capture, gain_of, run_model
from optimum_structprune.method.loop import prune_layers_
from optimum_structprune.method.shrink import Masks
from optimum_structprune.method.whole_model import WholeModel
from optimum_structprune.steps.data import source_of
from optimum_structprune.steps.layers import Norm


SEQUENTIAL = STRUCTURES + ["bert", "modernbert", "llava"]
# A model, and whether its layers are fixed.
SOURCES = [(case, True) for case in SEQUENTIAL] + [("llama-bias", False), ("gpt_oss", False)]


def mlp_space(arch, layer):
    """Return the FFN space of a layer."""
    return next(space for space in arch.at(layer) if space.kind == "mlp")


def assert_same_moments(source, expected_source, layer, space):
    """Assert that two sources have the same moments at each consumer of a space."""
    by_domain = source.moments(layer, space, True)
    expected_by_domain = expected_source.moments(layer, space, True)
    for domain, expected_domain in zip(by_domain, expected_by_domain, strict=True):
        for moments, expected in zip(domain, expected_domain, strict=True):
            assert moments.count == expected.count
            assert moments.count > 0 or space.experts
            torch.testing.assert_close(moments.gram, expected.gram, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(moments.mean, expected.mean, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("case", "fixed"), SOURCES)
def test_layer_by_layer_equals_whole_model(case, fixed):
    model = build(case)
    arch = describe(model)
    samples = list(batches())
    samples.append(Batch(1, token_ids(3, 20)))  # inputs may differ in length

    single_layers = source_of(model, arch, samples, fixed=fixed)
    with whole_model_at_once():
        whole_model = source_of(model, arch, samples)
    assert isinstance(source_of(model, arch, samples), InMemory)

    for layer in range(arch.num_layers):
        for space in arch.at(layer):
            if space.inside:
                assert_same_moments(single_layers, whole_model, layer, space)
            else:
                scores = contributions(single_layers, space, reap)
                expected = contributions(whole_model, space, reap)
                torch.testing.assert_close(scores, expected)
        single_layers.advance(layer)

    assert count_hooks(model) == 0


class Between(nn.ModuleList):
    """The layers of a model that changes the hidden states between its layers."""

    def __getitem__(self, index):
        if isinstance(index, int):
            return super().__getitem__(index)
        # The forward pass of the model takes a slice.
        return [lambda hidden, layer=layer, **kwargs: layer(hidden + 1, **kwargs) for layer in self]


@pytest.mark.parametrize("case", ["gemma4_text", "gemma4_text-experts"])
def test_a_family_whose_layers_get_more_than_hidden_states_falls_back_to_the_whole_model(case):
    model = build(case)
    arch = describe(model)
    with pytest.raises(NotSequentialError, match="called with more than hidden states"):
        InMemory(model, arch, batches())
    assert isinstance(source_of(model, arch, batches()), WholeModel)
    assert count_hooks(model) == 0

    source = source_of(model, arch, batches())
    for space in arch.spaces:
        if not space.inside:
            continue
        for domain in source.moments(space.layer, space, True):
            assert sum(moments.count for moments in domain) > 0

    assert count_hooks(model) == 0


def test_a_model_that_changes_hidden_states_between_layers_is_pruned():
    model = build("llama-tied")
    model.model.layers = Between(model.model.layers)
    with pytest.raises(NotSequentialError, match="between layers 0 and 1"):
        capture(model, describe(model), batches()[0].ids, all_layers=True)

    small = pruned_on(data_of(config(rounds=2)), model, {"mlp": 24}).model
    assert small.config.intermediate_size == 24
    assert count_hooks(small) == 0

    refitted = pruned_on(data_of(config(refit="least_squares")), model, {"mlp": 24}).model
    plain = pruned_on(data_of(config(refit="none")), model, {"mlp": 24}).model
    original = logits(model)
    assert (logits(refitted) - original).norm() < (logits(plain) - original).norm()


@pytest.mark.parametrize("case", STRUCTURES)
def test_the_last_layer_gets_the_hidden_states_of_the_smaller_model(case):
    model = build(case)
    arch = describe(model)
    data = data_of(config())
    widths = {"mlp": arch.of("mlp")[0].width // 2}
    source = source_of(model, arch, data.own_batches, data.config.feedback_share)
    smaller = shrunk_skeleton(model, arch, widths)
    prune_layers_(Masks(model, arch, undoable=False), source, data.method(model, arch), widths, smaller)

    inputs = []

    def record(_, args, kwargs):
        inputs.append(hidden_states_of(args, kwargs))

    last_layer = layer_list(model, arch)[-1]
    with intercept([last_layer], record), torch.no_grad():
        for batch in source.batches:
            run_model(model, batch.ids)

    for hidden, expected in zip(source.hidden, inputs, strict=True):
        torch.testing.assert_close(hidden, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("case", "factor"),
    [("llama-tied", 1), ("granite", 0.7), ("gpt_neox", 1), ("opt", 1), ("phi3", 1), ("gemma2", None), ("olmo2", None)],
)
def test_noise_shows_the_factor_between_a_module_and_the_residual_stream(case, factor):
    model = build(case)
    arch = describe(model)
    source = InMemory(model, arch, [Batch(0, token_ids())], error_feedback=1.0)

    name = arch.of("mlp")[0].consumers[0].module.removeprefix(arch.layer_prefix(0))
    gain = gain_of(source, 0, name)

    if factor is None:
        assert gain is None
    else:
        assert gain == pytest.approx(factor, rel=1e-3)
    assert count_hooks(model) == 0


@pytest.mark.parametrize(("case", "plus"), [("gemma2", 1), ("olmo2", 0)])
def test_noise_shows_the_norm_after_a_module(case, plus):
    model = build(case)
    arch = describe(model)
    norm = layer_list(model, arch)[0].post_feedforward_layernorm
    nn.init.normal_(norm.weight, 1.0, 0.3)

    source = InMemory(model, arch, [Batch(0, token_ids())], error_feedback=0.25)
    source.find_other_path = Norm.after_module
    source.hidden = [hidden + 0.5 for hidden in source.hidden]
    source.advance_original(0, ["mlp"])

    space = mlp_space(arch, 0)
    consumer = space.consumers[0].module
    path = source.residual_path(0, consumer)
    assert model.get_submodule(path.module) is norm
    assert count_hooks(model) == 0
    torch.testing.assert_close(path.weight, norm.weight.detach() + plus, rtol=1e-2, atol=1e-2)

    ((moments,),) = source.moments(0, space, True)
    error = 0.25 * (source.original[0] - source.output(0, 0)).flatten(0, 1)
    inputs = []
    products = []
    with observe(model, [consumer], lambda _, x: inputs.append(x)), torch.no_grad():
        with observe(norm, [""], lambda _, y: products.append(y)):
            source.output(0, 0)

    # The refit gets the error in front of the norm, relative to the size by which the norm divides.
    x = inputs[0].flatten(0, 1)
    product = products[0].flatten(0, 1)
    size = product.square().mean(-1, keepdim=True).sqrt()
    fitted_inputs, fitted_error, _ = path.to_fit(x, error, product)
    torch.testing.assert_close(fitted_inputs, x / size)
    expected = fitted_error.T @ fitted_inputs / len(x)
    torch.testing.assert_close(moments.error_cross, expected.detach(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("case", "share"), [("llama-tied", 0.5), ("gemma2", 0.0), ("mixtral", 0.0)])
def test_error_feedback_is_off_if_no_consumer_can_correct_an_error(case, share):
    model = build(case)
    source = InMemory(model, describe(model), [Batch(0, token_ids())], error_feedback=0.5)
    source.advance_original(0, ["mlp"])

    assert source.error_feedback == share
    assert (source.original[0] is source.hidden[0]) == (share == 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moments_hold_the_error_of_the_residual_stream(dtype):
    model = build("granite").to(dtype)
    arch = describe(model)
    source = InMemory(model, arch, [Batch(0, token_ids())], error_feedback=0.25)
    original_output = source.output(0, 0)
    source.hidden = [hidden + 0.5 for hidden in source.hidden]
    source.advance_original(0, ["mlp"])

    space = mlp_space(arch, 0)
    ((moments,),) = source.moments(0, space, True)
    inputs = []

    def record(_, x):
        inputs.append(x.float().flatten(0, 1))

    with observe(model, [space.consumers[0].module], record):
        error = 0.25 * (original_output - source.output(0, 0)).float().flatten(0, 1) / 0.7

    torch.testing.assert_close(moments.error_mean, error.mean(0), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(moments.error_cross, error.T @ inputs[0] / len(error), rtol=1e-2, atol=1e-2)

    ((plain,),) = InMemory(model, arch, [Batch(0, token_ids())]).moments(0, space, True)
    assert plain.error_mean is None


def test_the_gain_does_not_depend_on_the_size_of_a_batch():
    """Several processes, each with a part of the samples, then compute the same gain as one process."""
    model = build("llama-tied")
    ids = token_ids()
    with torch.no_grad():  # the attention's output reaches the layer's output through the FFN too, but weakly
        model.model.layers[0].mlp.down_proj.weight.mul_(0.01)
    arch = describe(model)
    name = arch.of("attention")[0].consumers[0].module.removeprefix(arch.layer_prefix(0))

    gains = []
    for size in (1, 2, len(ids)):
        samples = [Batch(0, part) for part in ids.split(size)]
        source = InMemory(model, arch, samples, error_feedback=1.0)
        gains.append(gain_of(source, 0, name))

    assert gains[0] is not None
    assert gains[0] != 1
    assert gains == [pytest.approx(gains[0], rel=1e-6)] * 3


def test_error_feedback_changes_all_layers_but_the_first():
    """The first layer sees the original residual stream, which has no error."""
    model = build("llama-tied")
    corrected = prune_model(model, config(error_feedback=0.5), tokenizer())
    plain = prune_model(model, config(error_feedback=0.0), tokenizer())

    first, last = (layer.mlp.down_proj.weight for layer in corrected.model.layers)
    plain_first, plain_last = (layer.mlp.down_proj.weight for layer in plain.model.layers)
    torch.testing.assert_close(first, plain_first)
    assert not torch.allclose(last, plain_last)


def test_each_round_follows_the_original_residual_stream():
    """The masks and refits of the first round do not change the original outputs that the second round aims at."""
    model = build("llama-tied")
    one_round = prune_model(model, config(widths={"mlp": 39}, rounds=1), tokenizer())
    two_rounds = prune_model(model, config(widths={"mlp": 39}, rounds=2), tokenizer())

    for parameter, expected in zip(two_rounds.parameters(), one_round.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected, rtol=1e-3, atol=1e-5)
