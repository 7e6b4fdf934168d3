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


def change_and_check(masks, axis, original, turn):
    """Mask every other column of a consumer, change its other values, and check that its old values are stored."""
    weight, bias = read_consumer(masks.model, axis)
    columns = torch.arange(0, weight.shape[1], 2)
    if bias is not None:
        bias = bias + turn
    masks.write_(axis, columns, weight[:, columns] * (turn + 1), bias)

    masked_weight, _ = read_consumer(masks.model, axis)
    assert (masked_weight[:, 1::2] == 0).all()
    assert (masked_weight[:, 0] != 0).any()

    stored_weight, stored_bias = masks.original(axis)
    original_weight, original_bias = read_consumer(original, axis)
    assert torch.equal(stored_weight, original_weight)
    if original_bias is None:
        assert stored_bias is None
    else:
        assert torch.equal(stored_bias, original_bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", ["llama-tied", "llama-bias", "gpt2-tied", "mixtral", "gpt_oss"])
def test_masks_are_undone_exactly(case, dtype):
    model = build(case).to(dtype)
    original = deepcopy(model)
    arch = describe(model)
    masks = Masks(model, arch)
    axes = [axis for space in arch.spaces if space.inside for axis in space.consumers]

    # The second change does not store the values of the first change as original.
    for turn in (1, 2):
        for axis in axes:
            change_and_check(masks, axis, original, turn)
    assert not same_weights(model, original)

    masks.undo_(nullcontext)
    assert same_weights(model, original)
    assert dict(model.named_parameters()).keys() == dict(original.named_parameters()).keys()
    assert torch.equal(logits(model), logits(original))

    masks.undo_(nullcontext)
    assert same_weights(model, original), "a second undo restores nothing"


def test_no_layer_runs_with_a_graph():
    """A graph would hold the activations of a layer in memory."""
    model = build("llama-tied")
    grad_modes = []

    # Smaller layers take over the hooks.
    with intercept(layer_list(model, describe(model)), lambda *_: grad_modes.append(torch.is_grad_enabled())):
        prune_model(model, config(), tokenizer(), inplace=True)

    assert grad_modes
    assert not any(grad_modes)
