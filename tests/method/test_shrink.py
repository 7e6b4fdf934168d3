"""A pruned model equals the masked one for every family and space; `test_end_to_end.py` saves and reloads them."""

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


# All spaces of a model at once, and each space of some models by itself.
ALL_SPACES = [(case, "all") for case in PRUNABLE + list(OTHERS)]
SINGLE_SPACES = [(case, name) for case in STRUCTURES + OTHER_STRUCTURES for name in describe(build(case)).names]
SPACES = ALL_SPACES + with_long(SINGLE_SPACES, ["llama-tied", "gpt_oss"])


@pytest.mark.parametrize(("case", "name"), SPACES)
def test_a_pruned_model_computes_the_same_as_the_masked_one(case, name):
    model = build(case)
    arch = describe(model)
    names = (name,)
    if name == "all":
        names = arch.names
    plan = random_plan(arch, names)
    original = outputs(model)

    small = shrunk(model, arch, plan)

    torch.testing.assert_close(outputs(small), outputs(masked(model, arch, plan)), atol=1e-5, rtol=0)
    assert not torch.allclose(outputs(small), original, atol=1e-3), "pruning has to change something"
    assert torch.equal(outputs(model), original)
    assert_remembers_its_own_config(small)
    assert small.num_parameters() < model.num_parameters()
    if case in PRUNABLE:
        configs = {id(module.config) for module in small.modules() if hasattr(module, "config")}
        assert configs == {id(small.config)}


def test_a_tensor_that_was_not_cut_is_named():
    model = build("llama-tied")
    arch = describe(model)
    smaller = skeleton(model, shrunk_config(model.config, arch, {"mlp": 24}))
    plan = Plan(arch.model_type, {(0, "mlp"): tuple(range(24))})

    with pytest.raises(StructPruneError, match="mlp"):
        shrink_layer_(deepcopy(model), arch, 1, plan.keep, smaller)

    shrink_layer_(model, arch, 0, plan.keep, smaller)
    with pytest.raises(StructPruneError, match=r"model.layers.1.mlp.*The description of 'llama' is incomplete"):
        adopt_config_(model, smaller)


@pytest.mark.parametrize(("case", "names"), [("mixtral", ["expert"]), ("gpt_oss", ["mlp"]), ("llama-bias", ["mlp"])])
def test_a_gpu_never_holds_more_than_the_original_layer(case, names):
    model = build(case)
    arch = describe(model)
    plan = random_plan(arch, names)
    smaller = shrunk_skeleton(model, arch, plan.widths())
    num_parameters = shrunk(model, arch, plan).num_parameters()

    with card() as memory:
        put_on_card_(model)
        original = memory.now()
        memory.peak = original
        shrink_layer_(model, arch, 0, plan.keep, smaller)
        assert memory.peak == original
        assert memory.now() < original
        shrink_layer_(model, arch, 1, plan.keep, smaller)

    assert {parameter.device for parameter in model.parameters()} == {CARD}
    assert memory.now() == 4 * num_parameters


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
def test_an_error_leaves_the_original_layer_or_the_smaller_one(kind, monkeypatch):
    model = build("mixtral")
    arch = describe(model)
    plan = random_plan(arch, ["expert"])
    small = shrunk(model, arch, plan)

    failures = [
        ("while it is cut", torch, "stack", model),
        ("while it is replaced", torch.Tensor, "new_empty", small),
    ]
    for message, owner, name, expected in failures:
        failed = deepcopy(model)
        smaller = shrunk_skeleton(model, arch, plan.widths())
        monkeypatch.setattr(owner, name, failing(getattr(owner, name), 2, kind(message)))
        with pytest.raises(kind, match=message):
            shrink_layer_(failed, arch, 0, plan.keep, smaller)
        monkeypatch.undo()
        assert same_weights(layer_list(failed, arch)[0], layer_list(expected, arch)[0])


@pytest.mark.parametrize("widths", [{"mlp": 24, "attention": 2}, {"hidden": 24}, {"layer": 1}])
def test_the_hooks_that_move_inputs_between_devices_are_kept(widths):
    modules = ["embed_tokens", "layers.0", "layers.1", "norm", "rotary_emb"]
    places = {f"model.{name}": "cpu" for name in modules}
    places["lm_head"] = "cpu"
    model = dispatch_model(build("llama-untied"), device_map=places)
    calls = []

    class Counting(AlignDevicesHook):
        def pre_forward(self, module, *args, **kwargs):
            calls.append(module)
            return super().pre_forward(module, *args, **kwargs)

    hooked = list(layer_list(model, describe(model)))
    hooked.append(model.model.layers[0].mlp.down_proj)
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
