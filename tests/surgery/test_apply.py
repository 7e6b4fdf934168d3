"""A plan put onto the dense model gives the model that pruning without refit gave."""

import pytest
import torch
from helpers import logits, masked, same_weights
from models import build, config, tokenizer

from optimum_structprune import Plan, StructPruneError, StructPruner
from optimum_structprune.arch.load import describe
from optimum_structprune.arch.spec import LAYER, MODEL
from optimum_structprune.surgery.apply import apply_plan


RUNS = {
    "llama-tied": {"widths": {"mlp": 24, "attention": 2}},
    "gpt2-tied": {"widths": {"mlp": 24}},
    "falcon": {"widths": {"mlp": 24}},
    "olmoe": {"widths": {"mlp": 24, "expert": 3}},
    "deepseek_v2": {"widths": {"mlp": 24, "dense_mlp": 20, "expert": 3}},
    "qwen3_moe": {"widths": {"expert": 2}},
    "llama-untied": {"sparsity": 0.3, "allocation": "global", "round_to": 1},
    "llama-bias": {"widths": {"layer": 1, "hidden": 24, "mlp": 24}},
    "gemma2": {"widths": {"layer": 1, "hidden": 24, "attention": 2}},
    "mixtral": {"widths": {"layer": 1, "expert": 3, "hidden": 24, "mlp": 24}},
}


@pytest.mark.parametrize("case", RUNS)
def test_a_plan_gives_the_weights_of_its_run(case):
    pruner = StructPruner(config(refit="none", **RUNS[case]))
    dense = build(case)
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    pruned = pruner.prune_model(dense, tokenizer())
    assert pruner.plan.keep
    again = apply_plan(dense, Plan.from_dict(pruner.plan.to_dict()))
    assert type(again) is type(pruned) and same_weights(again, pruned)
    assert again.config.to_dict() == pruned.config.to_dict()
    torch.testing.assert_close(logits(again), logits(pruned), rtol=0, atol=0)
    assert all(torch.equal(before[name], tensor) for name, tensor in dense.state_dict().items())


@pytest.mark.parametrize("case", ["llama-tied", "olmoe"])
def test_the_result_equals_the_masked_model(case):
    pruner = StructPruner(config(**RUNS[case]))
    model = build(case)
    pruner.prune_model(model, tokenizer())
    arch = describe(model)
    torch.testing.assert_close(
        logits(apply_plan(model, pruner.plan)), logits(masked(model, arch, pruner.plan)), atol=1e-5, rtol=1e-5
    )


def test_layers_are_numbered_as_in_the_dense_model():
    model = build("llama-tied")
    units = tuple(range(0, 40, 2))
    small = apply_plan(model, Plan("llama", {(MODEL, LAYER): (1,), (1, "mlp"): units}))
    assert small.config.num_hidden_layers == 1 and small.config.intermediate_size == 20
    dense = model.model.layers[1].mlp.down_proj.weight
    assert torch.equal(small.model.layers[0].mlp.down_proj.weight, dense[:, list(units)])


def test_what_a_plan_says_of_removed_layers_and_experts_is_passed_over():
    small = apply_plan(build("llama-tied"), Plan("llama", {(MODEL, LAYER): (0,), (1, "mlp"): (0, 1)}))
    assert small.config.intermediate_size == 40
    plan = Plan("olmoe", {(layer, "expert"): (0, 2) for layer in (0, 1)} | {(0, "mlp/3"): (0, 1)})
    assert apply_plan(build("olmoe"), plan).config.num_experts == 2


@pytest.mark.parametrize(
    ("case", "plan", "message"),
    [
        ("llama-tied", Plan("opt", {}), "for a 'opt' model, this is a 'llama' model"),
        ("llama-tied", Plan("llama", {(0, "attention"): (0, 1, 2)}), "keeps 3 of 'attention' in layer 0.*is [24]"),
        ("llama-tied", Plan("llama", {(0, "mlp"): (0, 40)}), "units between 0 and 39"),
        ("olmoe", Plan("olmoe", {(0, "mlp/1"): tuple(range(24))}), "keeps 24 and 40 units of 'mlp' in layer 0"),
        ("gpt2-tied", Plan("gpt2", {(0, "mlp"): (0, 1)}), None),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(case, plan, message):
    model = build(case)
    if message is None:
        arch = describe(model)
        if not (arch.uniform or arch.of("mlp")[0].uniform):
            pytest.skip("its layers may differ")
        message = "keeps 2 units of 'mlp' in one layer and 128 in another"
    with pytest.raises(StructPruneError, match=message):
        apply_plan(model, plan)


def test_the_model_may_be_in_half_precision_and_in_training():
    model = build("llama-tied").to(torch.bfloat16).train()
    small = apply_plan(model, Plan("llama", {(layer, "mlp"): tuple(range(24)) for layer in (0, 1)}))
    assert small.training and small.dtype == torch.bfloat16
    assert torch.equal(small.model.layers[0].mlp.up_proj.weight, model.model.layers[0].mlp.up_proj.weight[:24])
