"""A pruning on one or several simulated GPUs keeps the units and weights that a pruning on the CPU keeps."""

import pytest
from gpu.compare import assert_same_on_gpus, weights
from models import build, config, three_layers, tokenizer

from optimum_structprune import StructPruner


def pruned(settings, inplace=False):
    """Return work that prunes a model, and returns its weights and the kept units."""

    def work(model):
        pruner = StructPruner(settings)
        small = pruner.prune_model(model, tokenizer(), inplace=inplace)
        return {"keep": {str(key): list(kept) for key, kept in pruner.plan.keep.items()}, "weights": weights(small)}

    return work


SPACES = {
    "channels and groups": ("llama-tied", {"widths": {"mlp": 24, "attention": 2}}),
    "untied head": ("llama-untied", {"widths": {"mlp": 24}}),
    "layers": ("llama-tied", {"widths": {"layer": 1}}),
    "residual stream": ("llama-untied", {"widths": {"hidden": 24}}),
    "experts": ("olmoe", {"widths": {"expert": 3}}),
    "units of experts": ("qwen3_moe", {"widths": {"mlp": 24, "attention": 2}}),
    "encoder and decoder": ("t5-gated", {"widths": {"encoder_mlp": 24, "decoder_mlp": 20}}),
    "sensitivity": ("llama-tied", {"sparsity": 0.2, "allocation": "sensitivity", "round_to": 1}),
    "search": ("llama-tied", {"sparsity": 0.2, "allocation": "search", "round_to": 1}),
    "search of one shape": ("llama-tied", {"sparsity": 0.2, "allocation": "search_uniform", "round_to": 1}),
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


@pytest.mark.slow
def test_three_gpus():
    gpus = assert_same_on_gpus(pruned(config(widths={"mlp": 24, "attention": 2, "layer": 2})), three_layers, 3)
    assert len(gpus.products) == 3
