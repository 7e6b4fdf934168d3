"""Pruned ≡ masked for every family and space; `test_end_to_end.py` saves and reloads every family."""

from copy import deepcopy

import pytest
import torch
from accelerate import dispatch_model
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from helpers import (
    CARD,
    assert_remembers_its_own_config,
    card,
    failing,
    logits,
    masked,
    outputs,
    put_on_card_,
    random_plan,
    same_weights,
    shrunk,
    with_long,
)
from models import OTHER_STRUCTURES, OTHERS, PRUNABLE, STRUCTURES, build, config, tokenizer

from optimum_structprune import Plan, StructPruneError, prune_model
from optimum_structprune.arch.load import describe
from optimum_structprune.arch.meta import shrunk_skeleton, skeleton
from optimum_structprune.arch.modules import adopt_config_, layer_list
from optimum_structprune.arch.shrink import shrunk_config
from optimum_structprune.method.shrink import shrink_layer_


SPACES = [(case, name) for case in (*STRUCTURES, *OTHER_STRUCTURES) for name in describe(build(case)).names]


@pytest.mark.parametrize(
    ("case", "name"),
    [*((case, "all") for case in (*PRUNABLE, *OTHERS)), *with_long(SPACES, ["llama-tied", "gpt_oss"])],
)
def test_a_model_without_random_units_computes_what_the_masked_one_does(case, name):
    model = build(case)
    arch = describe(model)
    plan = random_plan(arch, arch.names if name == "all" else (name,))
    dense = outputs(model)
    small = shrunk(model, arch, plan)
    torch.testing.assert_close(outputs(small), outputs(masked(model, arch, plan)), atol=1e-5, rtol=0)
    assert not torch.allclose(outputs(small), dense, atol=1e-3), "pruning changed nothing, so the test shows nothing"
    assert torch.equal(outputs(model), dense)
    assert_remembers_its_own_config(small)
    assert small.num_parameters() < model.num_parameters()
    if case in PRUNABLE:
        assert {id(module.config) for module in small.modules() if hasattr(module, "config")} == {id(small.config)}


def test_a_forgotten_tensor_is_named():
    model = build("llama-tied")
    arch, fields = describe(model), shrunk_config(model.config, describe(model), {"mlp": 24})
    plan, smaller = Plan(arch.model_type, {(0, "mlp"): tuple(range(24))}), skeleton(model, fields)
    with pytest.raises(StructPruneError, match="mlp"):
        shrink_layer_(deepcopy(model), arch, 1, plan.keep, smaller)
    shrink_layer_(model, arch, 0, plan.keep, smaller)
    with pytest.raises(StructPruneError, match=r"model.layers.1.mlp.*The description of 'llama' is incomplete"):
        adopt_config_(model, smaller)


@pytest.mark.parametrize(("case", "names"), [("mixtral", ["expert"]), ("gpt_oss", ["mlp"]), ("llama-bias", ["mlp"])])
def test_a_card_never_holds_more_than_the_whole_layer(case, names):
    model = build(case)
    arch = describe(model)
    plan = random_plan(arch, names)
    small, expected = (shrunk_skeleton(model, arch, plan.widths()), shrunk(model, arch, plan).num_parameters())
    with card() as found:
        put_on_card_(model)
        found.peak = whole = found.now()
        shrink_layer_(model, arch, 0, plan.keep, small)
        assert found.peak == whole > found.now()
        shrink_layer_(model, arch, 1, plan.keep, small)
    assert {parameter.device for parameter in model.parameters()} == {CARD}
    assert found.now() == 4 * expected


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
def test_an_error_leaves_the_whole_layer_or_the_smaller_one(kind, monkeypatch):
    model = build("mixtral")
    arch = describe(model)
    plan = random_plan(arch, ["expert"])
    small = shrunk(model, arch, plan)
    owners = {"while it is cut": (torch, "stack"), "while it is replaced": (torch.Tensor, "new_empty")}
    for when, (owner, name) in owners.items():
        dense = deepcopy(model)
        monkeypatch.setattr(owner, name, failing(getattr(owner, name), 2, kind(when)))
        with pytest.raises(kind, match=when):
            shrink_layer_(dense, arch, 0, plan.keep, shrunk_skeleton(model, arch, plan.widths()))
        monkeypatch.undo()
        expected = model if when == "while it is cut" else small
        assert same_weights(layer_list(dense, arch)[0], layer_list(expected, arch)[0])


@pytest.mark.parametrize("widths", [{"mlp": 24, "attention": 2}, {"hidden": 24}, {"layer": 1}])
def test_the_hooks_that_move_inputs_between_devices_stay(widths):
    model = build("llama-untied")
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "cpu", "model.norm": "cpu"}
    model = dispatch_model(model, device_map={**places, "model.rotary_emb": "cpu", "lm_head": "cpu"})
    calls = []

    class Counting(AlignDevicesHook):
        def pre_forward(self, module, *args, **kwargs):
            calls.append(module)
            return super().pre_forward(module, *args, **kwargs)

    hooked = [*layer_list(model, describe(model)), model.model.layers[0].mlp.down_proj]
    for module in hooked:
        add_hook_to_module(module, Counting(execution_device="cpu"))
    expected = prune_model(build("llama-untied"), config(widths=widths), tokenizer())
    small = prune_model(model, config(widths=widths), tokenizer(), inplace=True)
    layers = layer_list(small, describe(small))
    assert all(hasattr(layer, "_hf_hook") for layer in layers)
    calls.clear()
    assert torch.equal(logits(small), logits(expected))
    assert [module for module in calls if module in layers] == layers
    assert all(module not in hooked for module in calls), "a layer that was replaced still runs"
