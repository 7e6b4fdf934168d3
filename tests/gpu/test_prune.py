"""A pruning on one or several simulated GPUs keeps the units and weights that a pruning on the CPU keeps."""

import pytest
from gpu.compare import assert_same_on_gpus, weights
from models import build, config, tokenizer

from optimum_structprune import StructPruner


def pruned(settings, inplace=False):
    """Return work that prunes a model, and returns its weights and the kept units."""

    def work(model):
        pruner = StructPruner(settings)
        small = pruner.prune_model(model, tokenizer(), inplace=inplace)
        return {"keep": {str(key): list(kept) for key, kept in pruner.plan.keep.items()}, "weights": weights(small)}

    return work


@pytest.mark.parametrize("count", [1])
@pytest.mark.parametrize("case", ["llama-tied", "llama-untied"])
def test_units_inside_the_layers(case, count):
    settings = config(widths={"mlp": 24, "attention": 2})
    gpus = assert_same_on_gpus(pruned(settings), lambda: build(case), count)
    assert len(gpus.products) == count
