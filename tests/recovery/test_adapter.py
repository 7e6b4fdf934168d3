"""Adapters: what of a model is trainable under them, which model they fit, and what merging makes of them."""

import json
import shutil
from copy import deepcopy

import pytest
import torch
from helpers import failing, logits, recovery_config, same_weights
from models import CASES, build, config, tokenizer

from optimum_structprune import Recovery, RecoveryConfig, StructPruneError, load_adapter, prune_model, recover
from optimum_structprune.arch.load import describe
from optimum_structprune.arch.spec import EXPERT
from optimum_structprune.recovery.adapter import adapted, lora_config
from optimum_structprune.recovery.resume import INPUTS_NAME
from optimum_structprune.recovery.trainer import DistillTrainer
from optimum_structprune.system.fingerprint import weights_hash


@pytest.fixture(scope="module")
def pruned():
    return prune_model(build("llama-tied"), config(), tokenizer())


@pytest.fixture(scope="module")
def saved(pruned, tmp_path_factory):
    """An adapter that was kept, and its folder."""
    folder = tmp_path_factory.mktemp("adapter") / "out"
    recovery = Recovery(recovery_config(tokens=96, merge=False))
    kept = recovery.recover_model(deepcopy(pruned), tokenizer())
    recovery.save(kept, folder)
    return kept, folder


def trainable(model) -> set[str]:
    """Which kinds of weights are trainable."""
    return {"adapter" if "lora_" in name else "base" for name, p in model.named_parameters() if p.requires_grad}


def flags_of(model) -> list[bool]:
    return [parameter.requires_grad for parameter in model.parameters()]


def test_a_kept_adapter_is_trainable_and_what_is_under_it_is_not(pruned, saved):
    kept, folder = saved
    assert trainable(kept) == {"adapter"} and not kept.training
    assert trainable(load_adapter(deepcopy(pruned), folder)) == set()
    inputs = json.loads((folder / INPUTS_NAME).read_text())
    assert inputs["model"] == weights_hash(pruned) and inputs["teacher"] is None
    assert inputs["training"]["learning_rate"] == 1e-2 and inputs["lora"] == {"r": 2}
    again = load_adapter(deepcopy(pruned), folder, is_trainable=True)
    assert trainable(again) == {"adapter"}
    torch.testing.assert_close(logits(again), logits(kept))


def test_an_adapter_of_another_model_of_the_same_widths_is_refused(pruned, saved):
    other = deepcopy(pruned)
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight[0].mul_(1.1)
    before = deepcopy(other)
    message = f"trained on the model {weights_hash(pruned)[:12]}…, and this is {weights_hash(other)[:12]}…: their"
    with pytest.raises(StructPruneError, match=message):
        load_adapter(other, saved[1])
    assert same_weights(other, before) and trainable(other) == {"base"} and not hasattr(other, "peft_config")


def test_an_adapter_of_other_widths_and_none_at_all_are_refused(saved, tmp_path):
    dense = build("llama-tied")
    before = deepcopy(dense)
    with pytest.raises(StructPruneError, match="their weights are not the same"):
        load_adapter(dense, saved[1])
    assert same_weights(dense, before) and trainable(dense) == {"base"} and not hasattr(dense, "peft_config")
    shutil.copytree(saved[1], tmp_path / "foreign")
    (tmp_path / "foreign" / INPUTS_NAME).unlink()
    with pytest.raises(StructPruneError, match=r"mlp.*\[2, 24\].*\[2, 40\]"), pytest.warns(UserWarning):
        load_adapter(dense, tmp_path / "foreign")
    with pytest.warns(UserWarning), pytest.raises(StructPruneError, match="holds no adapter"):
        load_adapter(dense, tmp_path)


def test_an_adapter_fits_its_model_in_bfloat16_and_warns_where_it_does_not_say_which(pruned, saved, tmp_path):
    assert weights_hash(deepcopy(pruned).bfloat16()) == weights_hash(pruned)
    for path in saved[1].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / INPUTS_NAME).unlink()
    with pytest.warns(UserWarning, match="does not say which model its adapter was trained on"):
        load_adapter(deepcopy(pruned), tmp_path)


@pytest.mark.parametrize("lora", [
    {"target_modules": ["q_proj", "v_proj", "embed_tokens"]},
    {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
    {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
])  # fmt: skip
def test_tied_weights_are_not_trained_apart_and_merged(pruned, lora):
    model = deepcopy(pruned)
    settings = lora_config(recovery_config(lora={"r": 2, **lora}), model)
    with pytest.raises(
        StructPruneError, match=r"would train (model.embed_tokens|lm_head).weight, which is one tensor with"
    ):
        recover(model, tokenizer(), recovery_config(lora={"r": 2, **lora}))
    assert [*model.state_dict()] == [*pruned.state_dict()] and same_weights(model, pruned)
    assert trainable(model) == {"base"}
    adapted(model, settings, merge=False)  # an adapter that is kept is what was trained


def test_what_stops_a_training_takes_the_adapter_off(monkeypatch):
    model = build("llama-untied")
    before, lora = (
        deepcopy(model),
        {"r": 2, "target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"]},
    )
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


@pytest.mark.parametrize(
    "case", [each if each in FORMS else pytest.param(each, marks=pytest.mark.slow) for each in RUNNING]
)
def test_the_default_adapter_trains_what_the_merged_model_has(case):
    model = build(case)
    dense, spaces = deepcopy(model), describe(model).of(EXPERT)
    with_adapter = adapted(model, lora_config(recovery_config(lora={}), model), merge=False)
    for name, parameter in with_adapter.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    before = logits(with_adapter.eval())
    merged = with_adapter.merge_and_unload()
    assert torch.allclose(logits(merged), before, atol=1e-5)
    matrices = {axis.param for space in spaces for axis in space.axes if "bias" not in axis.param}
    for name in matrices:
        assert merged.get_parameter(name).ndim < 2 or not torch.equal(
            merged.get_parameter(name), dense.get_parameter(name)
        )


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
