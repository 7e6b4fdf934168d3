"""The loop called by hand: what it gives, what it tells, and what an error leaves behind."""

from contextlib import nullcontext
from copy import deepcopy

import pytest
import torch
from helpers import count_hooks, data_of, logits, same_weights
from models import build, config, tokenizer

from optimum_structprune import StructPruner
from optimum_structprune.arch.hooks import intercept
from optimum_structprune.arch.load import describe
from optimum_structprune.arch.meta import shrunk_skeleton
from optimum_structprune.arch.modules import adopt_config_, layer_list
from optimum_structprune.method.layers import InMemory
from optimum_structprune.method.loop import prune_layers_
from optimum_structprune.method.shrink import Masks, read_consumer


def pruned_by_hand(model, settings):
    """Prune a model with the loop alone, on the samples of a config, and return the kept units."""
    data, arch, widths = data_of(settings), describe(model), settings.widths
    smaller = shrunk_skeleton(model, arch, widths)
    source = InMemory(model, arch, data.own_batches, data.config.feedback_share)
    masks = Masks(model, arch, undoable=False)
    prune_layers_(masks, source, data.method(model, arch), widths, smaller)
    adopt_config_(model, smaller)
    return masks.keep


@pytest.mark.parametrize(("case", "fields"), [
    ("llama-tied", {}),
    ("llama-tied", {"criterion": "random", "refit": "none"}),
    ("llama-bias", {"criterion": "flap"}),
    ("gpt2-tied", {"criterion": "obs_drive"}),
    ("gemma2", {"widths": {"mlp": 24, "attention": 1}, "error_feedback": 1.0}),
    ("qwen2", {"widths": {"attention": 1}, "criterion": "obs"}),
])  # fmt: skip
def test_it_gives_what_a_pruner_gives_to_the_bit(case, fields):
    settings, model = config(**fields), build(case)
    pruner = StructPruner(settings)
    expected = pruner.prune_model(build(case), tokenizer())
    assert pruned_by_hand(model, settings) == pruner.plan.keep
    assert same_weights(model, expected) and torch.equal(logits(model), logits(expected))
    assert model.config.to_dict() == expected.config.to_dict() and count_hooks(model) == 0


@pytest.mark.parametrize("case", ["llama-tied", "gemma2", "gpt_oss"])
def test_what_is_masked_first_is_cut_to_the_same(case):
    """Each pass starts from the dense weights, and one that keeps all units that are left changes nothing."""
    settings, model, direct = config(criterion="obs"), build(case), build(case)
    data, arch, widths = data_of(settings), describe(model), settings.widths
    masks = Masks(model, arch)
    for smaller in (None, shrunk_skeleton(model, arch, widths)):
        source = data.source(model, arch, data.config.feedback_share)
        prune_layers_(masks, source, data.method(model, arch), widths, smaller)
    adopt_config_(model, smaller)
    direct_masks = Masks(direct, arch, undoable=False)
    source = data.source(direct, arch, data.config.feedback_share)
    prune_layers_(direct_masks, source, data.method(direct, arch), widths, shrunk_skeleton(direct, arch, widths))
    assert masks.keep == direct_masks.keep and masks.lost
    for mine, theirs in zip(model.parameters(), direct.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


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
        pruned_by_hand(model, config())
    assert ran and not any(ran)
