"""Masks are undone to the bit, and no layer runs with a graph; `test_examples.py` calls the loop by hand."""

from contextlib import nullcontext
from copy import deepcopy

import pytest
import torch
from helpers import logits, same_weights
from models import build, config, tokenizer

from optimum_structprune import prune_model
from optimum_structprune.arch.hooks import intercept
from optimum_structprune.arch.load import describe
from optimum_structprune.arch.modules import layer_list
from optimum_structprune.method.shrink import Masks, read_consumer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", ["llama-tied", "llama-bias", "gpt2-tied", "mixtral", "gpt_oss"])
def test_masks_are_undone_exactly(case, dtype):
    """Whichever way round a weight is stored, of one expert or of all, with a bias and without."""
    model = build(case).to(dtype)
    dense, arch = deepcopy(model), describe(model)
    masks = Masks(model, arch)
    axes = [axis for space in arch.spaces if space.inside for axis in space.consumers]
    for turn in (1, 2):  # the second change does not take the first one for dense
        for axis in axes:
            weight, bias = read_consumer(model, axis)
            columns = torch.arange(0, weight.shape[1], 2)
            masks.write_(axis, columns, weight[:, columns] * (turn + 1), None if bias is None else bias + turn)
            present = read_consumer(model, axis)[0]
            assert (present[:, 1::2] == 0).all() and (present[:, 0] != 0).any()
            for ours, theirs in zip(masks.dense(axis), read_consumer(dense, axis), strict=True):
                assert (ours is None and theirs is None) or torch.equal(ours, theirs)
    assert not same_weights(model, dense)
    parameters = {name: parameter for name, parameter in dense.named_parameters()}
    masks.undo_(nullcontext)
    assert same_weights(model, dense) and dict(model.named_parameters()).keys() == parameters.keys()
    assert torch.equal(logits(model), logits(dense))
    masks.undo_(nullcontext)
    assert same_weights(model, dense), "what is undone is dense from then on: nothing of it comes back"


def test_no_layer_runs_with_a_graph():
    """Which would hold the activations of a layer in memory."""
    model, ran = build("llama-tied"), []
    # Smaller layers take over the hooks.
    with intercept(layer_list(model, describe(model)), lambda *_: ran.append(torch.is_grad_enabled())):
        prune_model(model, config(), tokenizer(), inplace=True)
    assert ran and not any(ran)
