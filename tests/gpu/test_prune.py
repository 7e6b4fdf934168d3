"""A pruning on one or several simulated GPUs keeps the same units and weights as a pruning on the CPU."""

from itertools import product
from unittest import mock

import pytest
from gpu.compare import assert_same_on_gpus, on_gpu, spread, weights
from helpers import whole_model_at_once
from models import build, config, fewer_tokens, real_text_model, three_layers, token_ids, tokenizer
from quantized import Reversible, quantized

from optimum_structprune import RunOptions, StructPruner
from optimum_structprune.arch.load import describe
from optimum_structprune.steps.checkpoint import LayerCheckpoint


def prune_with(settings):
    """Return work that prunes a model on random tokens, and returns its weights and the kept units."""
    inputs = {"a": token_ids(6, 24), "b": token_ids(6, 24, seed=2)}

    def work(model):
        pruner = StructPruner(settings)
        small = pruner.prune_model(model, inputs=inputs)
        units = {str(key): list(units) for key, units in pruner.result.plan.keep.items()}
        return {"keep": units, "weights": weights(small)}

    return work


SPACES = {
    "channels and groups": ("llama-tied", {"widths": {"mlp": 24, "attention": 2}}),
    "untied head": ("llama-untied", {"widths": {"mlp": 24}}),
    "layers": ("llama-tied", {"widths": {"layer": 1}}),
    "residual stream": ("llama-untied", {"widths": {"hidden": 24}}),
    "experts": ("olmoe", {"widths": {"expert": 3}}),
    "units of experts": ("qwen3_moe", {"widths": {"mlp": 24, "attention": 2}}),
    "encoder and decoder": ("t5-gated", {"widths": {"mlp": 24}}),
    "sensitivity": ("llama-tied", {"sparsity": 0.2, "allocation": "sensitivity", "round_to": 1}),
    "two rounds": ("llama-tied", {"widths": {"mlp": 24, "attention": 2}, "rounds": 2}),
    "wanda": ("llama-tied", {"widths": {"attention": 2}, "criterion": "wanda", "refit": "none"}),
    "flap": ("llama-tied", {"criterion": "flap"}),
    "magnitude": ("llama-tied", {"criterion": "magnitude"}),
    "random": ("llama-tied", {"criterion": "random"}),
    "obs": ("llama-tied", {"criterion": "obs"}),
    "obs_drive": ("llama-tied", {"criterion": "obs_drive"}),
    "without feedback": ("llama-untied", {"error_feedback": 0.0}),
    "gpt2": ("gpt2-tied", {"widths": {"mlp": 24}}),
    "gemma2": ("gemma2", {"widths": {"mlp": 24}}),
    "modernbert": ("modernbert", {"widths": {"mlp": 24}}),
}
FAST = [("untied head", 2), ("layers", 2), ("sensitivity", 2), ("channels and groups", 1)]


def parameters_of_spaces():
    """Return each name with one and with two GPUs. Only the fast ones are not marked as slow."""
    parameters = []
    for name, count in product(SPACES, (1, 2)):
        if (name, count) in FAST:
            parameters.append((name, count))
        else:
            parameters.append(pytest.param(name, count, marks=pytest.mark.slow))
    return parameters


@pytest.mark.parametrize(("name", "count"), parameters_of_spaces())
def test_one_or_two_gpus_prune_as_the_cpu_does(name, count):
    case, fields = SPACES[name]
    gpus = assert_same_on_gpus(prune_with(config(**fields)), lambda: build(case), count)
    assert len(gpus.products) == count


THREE_LAYERS = {
    "layers and units": {"widths": {"mlp": 24, "attention": 2, "layer": 2}},
    "residual stream": {"widths": {"hidden": 24, "mlp": 24}},
    "sensitivity": {"sparsity": 0.2, "allocation": "sensitivity", "round_to": 1},
    "three rounds": {"widths": {"mlp": 24}, "rounds": 3},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", THREE_LAYERS)
def test_three_gpus_prune_as_the_cpu_does(name):
    settings = config(**THREE_LAYERS[name])
    gpus = assert_same_on_gpus(prune_with(settings), three_layers, 3)
    assert len(gpus.products) == 3


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("with_channels", [False, True])
def test_a_vocabulary_trimming_for_a_language_is_the_same(count, with_channels):
    fields = {"languages": ["de"]}
    if with_channels:
        fields.update(widths=None, budget={"parameters": 0.8}, targets=["vocab", "mlp"])
    _, reader = real_text_model()

    def work(model):
        pruner = StructPruner(fewer_tokens(**fields))
        small = pruner.prune_model(model, reader)
        return {
            "tokens": small.config.vocab_size,
            "weights": weights(small),
            "languages": pruner.result.report.to_dict()["languages"],
        }

    # The figures of a language are measured on few words, so a small difference is large in them.
    assert_same_on_gpus(work, lambda: real_text_model()[0], count, tolerance=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])
def test_an_interrupted_pruning_resumes_with_the_same_weights(tmp_path, count):
    settings = config(widths={"mlp": 24})
    save_checkpoint = LayerCheckpoint.save

    def interrupt(self, *arguments):
        save_checkpoint(self, *arguments)
        raise KeyboardInterrupt

    def work(model):
        options = RunOptions(checkpoint_dir=str(tmp_path / model.device.type))
        with mock.patch.object(LayerCheckpoint, "save", interrupt), pytest.raises(KeyboardInterrupt):
            StructPruner(settings, options).prune_model(model, tokenizer())

        pruner = StructPruner(settings, options)
        small = pruner.prune_model(model, tokenizer())
        assert pruner.result.report.resumed
        return weights(small)

    assert_same_on_gpus(work, lambda: build("llama-untied"), count)


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])
def test_a_pruning_of_a_quantized_model_is_the_same(count):
    """The quantizer of this test unpacks to plain layers."""
    place_model = on_gpu if count == 1 else spread(count)

    def place(model):
        return quantized(Reversible(), place_model(model))

    def work(model):
        if model.device.type == "cpu":
            model = quantized(Reversible(), model)
        return prune_with(config(widths={"mlp": 24}))(model)

    assert_same_on_gpus(work, lambda: build("llama-tied"), count, place)


@pytest.mark.slow
@pytest.mark.parametrize("criterion", ["wanda", "obs"])
def test_a_pruning_in_bf16_is_the_same(criterion):
    settings = config(widths={"mlp": 24}, criterion=criterion)
    # The CPU rounds products of bf16 tensors in another order.
    assert_same_on_gpus(prune_with(settings), lambda: build("llama-tied").bfloat16(), tolerance=5e-2)


@pytest.mark.slow
def test_moments_of_the_whole_model_are_collected_on_the_devices_of_the_layers():
    settings = config(widths={"mlp": 24, "attention": 2})

    def work(model):
        with whole_model_at_once():
            return prune_with(settings)(model)

    assert_same_on_gpus(work, lambda: build("llama-untied"), 2)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["modernbert", "t5-gated", "bart"])
def test_a_pruning_of_a_model_with_an_encoder_has_the_same_figures(case):
    def work(model):
        space = next(space.kind for space in describe(model).spaces if "mlp" in space.kind)
        pruner = StructPruner(config(widths={space: 24}))
        small = pruner.prune_model(model, tokenizer())
        return {"weights": weights(small), "domains": pruner.result.report.to_dict()["domains"]}

    assert_same_on_gpus(work, lambda: build(case), 2)
