"""A pruning on one or several simulated GPUs keeps the units and weights that a pruning on the CPU keeps."""

from unittest import mock

import pytest
from gpu.compare import assert_same_on_gpus, spread, weights
from helpers import whole_model_at_once
from models import build, config, fewer_tokens, real_text_model, three_layers, token_ids, tokenizer
from quantized import Reversible, quantized

from optimum_structprune import RunOptions, StructPruner, prune
from optimum_structprune.arch.load import describe
from optimum_structprune.steps.checkpoint import LayerCheckpoint


def pruned(settings, **options):
    """Return work that prunes a model on random tokens, and returns its weights and the kept units."""
    inputs = {"a": token_ids(6, 24), "b": token_ids(6, 24, seed=2)}

    def work(model):
        pruner = StructPruner(settings)
        small = pruner.prune_model(model, **(options or {"inputs": inputs}))
        return {"keep": {str(key): list(kept) for key, kept in pruner.plan.keep.items()}, "weights": weights(small)}

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
CASES = [
    pytest.param(name, count, marks=() if (name, count) in FAST else pytest.mark.slow)
    for name in SPACES
    for count in (1, 2)
]


@pytest.mark.parametrize(("name", "count"), CASES)
def test_a_gpu_or_two_compute_what_the_cpu_computes(name, count):
    case, fields = SPACES[name]
    gpus = assert_same_on_gpus(pruned(config(**fields)), lambda: build(case), count)
    assert len(gpus.products) == count


THREE = {
    "layers and units": {"widths": {"mlp": 24, "attention": 2, "layer": 2}},
    "residual stream": {"widths": {"hidden": 24, "mlp": 24}},
    "sensitivity": {"sparsity": 0.2, "allocation": "sensitivity", "round_to": 1},
    "three rounds": {"widths": {"mlp": 24}, "rounds": 3},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", THREE)
def test_three_gpus(name):
    gpus = assert_same_on_gpus(pruned(config(**THREE[name])), three_layers, 3)
    assert len(gpus.products) == 3


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("with_channels", [False, True])
def test_tokens_with_languages(count, with_channels):
    fields = {"languages": ["de"]}
    if with_channels:
        fields |= {"widths": None, "budget": {"parameters": 0.8}, "targets": ["vocab", "mlp"]}
    _, reader = real_text_model()

    def work(model):
        pruner = StructPruner(fewer_tokens(**fields))
        small = pruner.prune_model(model, reader)
        return {
            "tokens": small.config.vocab_size,
            "weights": weights(small),
            "languages": pruner.report.to_dict()["languages"],
        }

    # Figures of languages are those of few words.
    assert_same_on_gpus(work, lambda: real_text_model()[0], count, tolerance=1e-3)


@pytest.mark.slow
def test_a_budget_of_loss():
    settings = config(widths=None, budget={"loss": 0.3}, targets=["mlp"], round_to=1)
    assert_same_on_gpus(
        lambda model: weights(prune(model, settings, tokenizer()).model), lambda: build("llama-untied")
    )


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])
def test_a_run_that_was_interrupted(tmp_path, count):
    settings = config(widths={"mlp": 24})

    def work(model):
        options = RunOptions(checkpoint_dir=str(tmp_path / model.device.type))
        saved = LayerCheckpoint.save

        def interrupt(self, *arguments):
            saved(self, *arguments)
            raise KeyboardInterrupt

        with mock.patch.object(LayerCheckpoint, "save", interrupt), pytest.raises(KeyboardInterrupt):
            StructPruner(settings, options).prune_model(model, tokenizer())
        pruner = StructPruner(settings, options)
        small = pruner.prune_model(model, tokenizer())
        assert pruner.report.resumed
        return weights(small)

    assert_same_on_gpus(work, lambda: build("llama-untied"), count)


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])
def test_a_quantized_model(count):
    """The stand-in unpacks to plain layers."""

    def place(model):
        model = model.to("cuda") if count == 1 else spread(count)(model)
        return quantized(Reversible(), model)

    def work(model):
        if model.device.type == "cpu":
            model = quantized(Reversible(), model)
        return pruned(config(widths={"mlp": 24}))(model)

    assert_same_on_gpus(work, lambda: build("llama-tied"), count, place)


@pytest.mark.slow
@pytest.mark.parametrize("criterion", ["wanda", "obs"])
def test_bf16(criterion):
    settings = config(widths={"mlp": 24}, criterion=criterion)
    # Products of bf16 tensors are rounded in another order on the CPU.
    assert_same_on_gpus(pruned(settings), lambda: build("llama-tied").bfloat16(), tolerance=5e-2)


@pytest.mark.slow
def test_the_whole_model_as_a_source():
    """Its moments are gathered on the devices of the layers."""

    def work(model):
        with whole_model_at_once():
            return pruned(config(widths={"mlp": 24, "attention": 2}))(model)

    assert_same_on_gpus(work, lambda: build("llama-untied"), 2)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["modernbert", "t5-gated", "bart"])
def test_the_figures_of_encoders(case):
    def work(model):
        space = next(space.kind for space in describe(model).spaces if "mlp" in space.kind)
        pruner = StructPruner(config(widths={space: 24}))
        small = pruner.prune_model(model, tokenizer())
        return {"weights": weights(small), "domains": pruner.report.to_dict()["domains"]}

    assert_same_on_gpus(work, lambda: build(case), 2)
