"""Pruned ≡ masked, and reload ≡ in memory, for every family and space."""

from copy import deepcopy

import pytest
import torch
from helpers import masked, random_plan, shrunk
from models import PRUNABLE, build, token_ids
from transformers import AutoModelForCausalLM

from optimum_structprune import Plan, StructPruneError
from optimum_structprune.arch.load import describe
from optimum_structprune.arch.meta import skeleton
from optimum_structprune.arch.shrink import legal_sizes, shrunk_config
from optimum_structprune.surgery.cut import adopt_config_, shrink_layer_


SPACES = [(case, name) for case in PRUNABLE for name in describe(build(case)).names]


@torch.no_grad()
def logits(model):
    return model(token_ids()).logits


@pytest.mark.parametrize(("case", "name"), [*SPACES, *((case, "all") for case in PRUNABLE)])
def test_pruned_equals_masked_and_reloads(case, name, tmp_path):
    model = build(case)
    arch = describe(model)
    plan = random_plan(arch, arch.names if name == "all" else (name,))
    dense = logits(model)
    small = shrunk(model, arch, plan)
    torch.testing.assert_close(logits(small), logits(masked(model, arch, plan)), atol=1e-5, rtol=0)
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
    arch = describe(model)
    plan = Plan(arch.model_type, {(space.layer, space.name): tuple(range(space.size)) for space in arch.spaces})
    small = deepcopy(model)
    smaller = skeleton(small, shrunk_config(model.config, arch, {}))
    for layer in range(arch.num_layers):
        shrink_layer_(small, arch, layer, plan, smaller)
    assert torch.equal(logits(small), logits(model))


@pytest.mark.parametrize("case", ["llama-tied", "gpt2-tied", "llama-untied"])
def test_ties_dtype_and_requires_grad_survive(case):
    model = build(case).to(torch.bfloat16).train()
    frozen = "k_proj.weight" if case.startswith("llama") else "c_fc.weight"
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.endswith(frozen))
    arch = describe(model)
    small = shrunk(model, arch, random_plan(arch, ("mlp",)))
    tied = small.get_input_embeddings().weight is small.get_output_embeddings().weight
    assert tied == case.endswith("-tied")
    assert {parameter.dtype for parameter in small.parameters()} == {torch.bfloat16}
    assert all(module.training for module in small.modules())
    assert {name for name, p in small.named_parameters() if not p.requires_grad} == {
        name for name, p in model.named_parameters() if not p.requires_grad
    }


def test_every_config_reference_is_the_new_one():
    model = build("llama-tied")
    arch = describe(model)
    small = shrunk(model, arch, random_plan(arch, arch.names))
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
    arch = describe(model)
    plan = Plan(arch.model_type, {(0, "mlp"): tuple(range(24))})
    smaller = skeleton(model, shrunk_config(model.config, arch, {"mlp": 24}))
    with pytest.raises(StructPruneError, match="mlp"):
        shrink_layer_(deepcopy(model), arch, 1, plan, smaller)
    small = deepcopy(model)
    shrink_layer_(small, arch, 0, plan, smaller)
    with pytest.raises(StructPruneError, match=r"model.layers.1.mlp.*the description of 'llama' is incomplete"):
        adopt_config_(
            small,
            shrunk_config(model.config, arch, {"mlp": 24}),
            skeleton(model, shrunk_config(model.config, arch, {"mlp": 24})),
        )
