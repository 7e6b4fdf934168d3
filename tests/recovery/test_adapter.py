"""Adapters: what they train of a model, and what merging makes of them."""

from copy import deepcopy

import pytest
import torch
from helpers import failing, logits, recovery_config, same_weights, with_long
from models import CASES, build, tokenizer

from optimum_structprune import RecoveryConfig, StructPruneError, recover
from optimum_structprune.arch.load import describe
from optimum_structprune.arch.spec import EXPERT
from optimum_structprune.recovery.adapter import adapted, lora_config
from optimum_structprune.recovery.trainer import DistillTrainer


def trainable(model) -> set[str]:
    """Which kinds of weights are trainable."""
    return {"adapter" if "lora_" in name else "base" for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("lora", [
    {"target_modules": ["q_proj", "v_proj", "embed_tokens"]},
    {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
    {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
])  # fmt: skip
def test_tied_weights_are_not_trained_apart_and_merged(pruned, lora):
    model = deepcopy(pruned)
    with pytest.raises(StructPruneError, match=r"would train (model.embed_tokens|lm_head).weight, which is one"):
        recover(model, tokenizer(), recovery_config(lora={"r": 2, **lora}))
    assert [*model.state_dict()] == [*pruned.state_dict()] and same_weights(model, pruned)
    assert trainable(model) == {"base"}


def test_what_stops_a_training_takes_the_adapter_off(monkeypatch):
    model = build("llama-untied")
    before = deepcopy(model)
    lora = {"r": 2, "target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"]}
    monkeypatch.setattr(DistillTrainer, "training_step", failing(DistillTrainer.training_step, 1, KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        recover(model, tokenizer(), recovery_config(tokens=96, lora=lora))
    assert [*model.state_dict()] == [*before.state_dict()] and torch.equal(logits(model), logits(before))
    assert trainable(model) == {"base"} and not hasattr(model, "peft_config")


def test_untied_embeddings_are_trained_and_merged(recwarn):
    model = build("llama-untied")
    lora = {"r": 2, "target_modules": ["q_proj", "embed_tokens", "lm_head"]}
    recover(model, tokenizer(), recovery_config(tokens=96, lora=lora))
    assert not [warning for warning in recwarn if "tie" in str(warning.message)]


# Routers of three forms beside stacked experts, and Mamba layers of two kinds.
FORMS = ("gpt_oss", "phimoe", "jamba", "nemotron_h")
RUNNING = [case for case in CASES if case != "zamba2"]  # whose small model does not run


@pytest.mark.parametrize("case", with_long(RUNNING, FORMS))
def test_the_default_adapter_trains_what_the_merged_model_has(case):
    model = build(case)
    dense, spaces = deepcopy(model), describe(model).of(EXPERT)
    with_adapter = adapted(model, lora_config(recovery_config(lora={}), model))
    for name, parameter in with_adapter.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    before = logits(with_adapter.eval())
    merged = with_adapter.merge_and_unload()
    assert torch.allclose(logits(merged), before, atol=1e-5)
    matrices = {axis.param for space in spaces for axis in space.axes if "bias" not in axis.param}
    for name in matrices:
        new, old = merged.get_parameter(name), dense.get_parameter(name)
        assert new.ndim < 2 or not torch.equal(new, old)


@pytest.mark.parametrize("case", ["llama-tied", "llama-untied", "gpt2-tied", "gemma3_text", "codegen"])
def test_where_tokens_have_gone_the_rows_of_the_others_are_trained_and_merged(case):
    """A head that is the embedding moves with it, one of its own too; one with a bias stays."""
    model = build(case).eval()
    before, table, head = logits(model), model.get_input_embeddings(), model.get_output_embeddings()
    old, own = table.weight.clone(), head.weight.clone()
    with_adapter = adapted(model, lora_config(RecoveryConfig(), model, fewer_tokens=True))
    torch.testing.assert_close(logits(with_adapter.eval()), before)
    for parameter in with_adapter.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape)
    trained = logits(with_adapter)
    merged = with_adapter.merge_and_unload()
    torch.testing.assert_close(logits(merged), trained)
    assert not torch.equal(table.weight, old) and torch.equal(head.weight, own) is (case == "codegen")
    assert (head.weight is table.weight) is (case not in ("llama-untied", "codegen"))
