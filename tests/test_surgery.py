"""Pruned ≡ masked, and reload ≡ in memory, for every family and space."""

from copy import deepcopy
from unittest.mock import patch

import pytest
import torch
from models import PRUNABLE, build, token_ids
from transformers import AutoModelForCausalLM

from optimum_structprune import Plan, StructPruneError
from optimum_structprune.arch.load import describe
from optimum_structprune.arch.shrink import legal_sizes, shrunk_config
from optimum_structprune.surgery import (
    adopt_config_,
    read_consumer,
    shrink_block_,
    skeleton,
    units_to_columns,
    write_consumer_,
)


KEEP = {"mlp": 24, "attention": 2, "expert": 3, "shared_mlp": 20, "dense_mlp": 24}
SPACES = [(case, name) for case in PRUNABLE for name in describe(build(case)).names]


def random_plan(spec, names) -> Plan:
    generator = torch.Generator().manual_seed(3)
    keep = {}
    for space in spec.spaces:
        if space.kind in names:
            width = KEEP[space.kind] * space.scale
            units = torch.randperm(space.size, generator=generator)[:width].sort().values
            keep[space.layer, space.name] = tuple(units.tolist())
    return Plan(spec.model_type, keep)


def shrunk(model, spec, plan):
    small = deepcopy(model)
    sizes = {name: KEEP[name] for name in plan.widths()}
    new_config = shrunk_config(model.config, spec, sizes)
    smaller = skeleton(small, new_config)
    for layer in range(spec.num_blocks):
        shrink_block_(small, spec, layer, plan, smaller)
    adopt_config_(small, new_config, smaller)
    return small


def masked(model, spec, plan):
    model = deepcopy(model)
    for space in spec.spaces:
        if space.whole and (space.layer, space.name) in plan.keep:
            silence(model, space, plan.keep[space.layer, space.name])
        for axis in space.into if (space.layer, space.name) in plan.keep else ():
            weight, bias = read_consumer(model, axis)
            keep = units_to_columns(plan.keep[space.layer, space.name], axis, weight.device)
            write_consumer_(model, axis, keep, weight[:, keep], bias)
    return model


def silence(model, space, keep):
    """Make a router's logits minus infinity where an expert is gone."""
    router = model.get_submodule(space.out[0].module)
    gone = [expert for expert in range(space.size) if expert not in keep]
    forward, linear = router.forward, torch.nn.functional.linear

    def silent_linear(*args):
        logits = linear(*args)
        logits[..., gone] = float("-inf")
        return logits

    def silent_forward(hidden):
        with patch("torch.nn.functional.linear", silent_linear):
            return forward(hidden)

    router.forward = silent_forward
    if hasattr(router, "e_score_correction_bias"):
        router.e_score_correction_bias[gone] = float("-inf")


@torch.no_grad()
def logits(model):
    return model(token_ids()).logits


@pytest.mark.parametrize(("case", "name"), [*SPACES, *((case, "all") for case in PRUNABLE)])
def test_pruned_equals_masked_and_reloads(case, name, tmp_path):
    model = build(case)
    spec = describe(model)
    plan = random_plan(spec, spec.names if name == "all" else (name,))
    dense = logits(model)
    small = shrunk(model, spec, plan)
    torch.testing.assert_close(logits(small), logits(masked(model, spec, plan)), atol=1e-5, rtol=0)
    assert not torch.allclose(logits(small), dense, atol=1e-3), "pruning changed nothing, so the test shows nothing"
    assert torch.equal(logits(model), dense)
    assert small.num_parameters() < model.num_parameters()

    small.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is type(model)
    torch.testing.assert_close(logits(again), logits(small), atol=1e-6, rtol=0)
    assert again.generate(token_ids(1, 4), min_new_tokens=3, max_new_tokens=3, do_sample=False).shape == (1, 7)


@pytest.mark.parametrize("case", PRUNABLE)
def test_keeping_everything_changes_nothing(case):
    model = build(case)
    spec = describe(model)
    plan = Plan(spec.model_type, {(space.layer, space.name): tuple(range(space.size)) for space in spec.spaces})
    small = deepcopy(model)
    smaller = skeleton(small, shrunk_config(model.config, spec, {}))
    for layer in range(spec.num_blocks):
        shrink_block_(small, spec, layer, plan, smaller)
    assert torch.equal(logits(small), logits(model))


@pytest.mark.parametrize("case", ["llama-tied", "gpt2-tied", "llama-untied"])
def test_ties_dtype_and_requires_grad_survive(case):
    model = build(case).to(torch.bfloat16).train()
    frozen = "k_proj.weight" if case.startswith("llama") else "c_fc.weight"
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.endswith(frozen))
    spec = describe(model)
    small = shrunk(model, spec, random_plan(spec, ("mlp",)))
    tied = small.get_input_embeddings().weight is small.get_output_embeddings().weight
    assert tied == case.endswith("-tied")
    assert {parameter.dtype for parameter in small.parameters()} == {torch.bfloat16}
    assert all(module.training for module in small.modules())
    assert {name for name, p in small.named_parameters() if not p.requires_grad} == {
        name for name, p in model.named_parameters() if not p.requires_grad
    }


def test_every_config_reference_is_the_new_one():
    model = build("llama-tied")
    spec = describe(model)
    small = shrunk(model, spec, random_plan(spec, spec.names))
    assert small.config.intermediate_size == 24 and small.config.head_dim == 4
    assert {id(module.config) for module in small.modules() if hasattr(module, "config")} == {id(small.config)}


def test_legal_sizes_follow_the_config_class():
    for case, expected in (("llama-tied", [1, 2, 4]), ("qwen2", [1, 2, 3, 4]), ("gemma2", [1, 2, 4])):
        model = build(case)
        assert legal_sizes(model.config, describe(model), "attention") == expected
    model = build("opt")
    assert legal_sizes(model.config, describe(model), "mlp") == list(range(1, 41))


def test_a_forgotten_tensor_is_named():
    model = build("llama-tied")
    spec = describe(model)
    plan = Plan(spec.model_type, {(0, "mlp"): tuple(range(24))})
    smaller = skeleton(model, shrunk_config(model.config, spec, {"mlp": 24}))
    with pytest.raises(StructPruneError, match="mlp"):
        shrink_block_(deepcopy(model), spec, 1, plan, smaller)
    small = deepcopy(model)
    shrink_block_(small, spec, 0, plan, smaller)
    with pytest.raises(StructPruneError, match=r"model.layers.1.mlp.*the description of 'llama' is incomplete"):
        adopt_config_(
            small,
            shrunk_config(model.config, spec, {"mlp": 24}),
            skeleton(model, shrunk_config(model.config, spec, {"mlp": 24})),
        )
