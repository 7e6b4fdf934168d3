"""What each way of training changes, and that the result is an ordinary model."""

from copy import deepcopy

import pytest
import torch
from helpers import logits, recovery_config, same_weights
from models import build, config, tokenizer
from transformers import AutoModelForCausalLM, TrainerCallback

from optimum_structprune import (
    Recovery,
    RecoveryConfig,
    StructPruneError,
    load_adapter,
    prune_model,
    recover,
)
from optimum_structprune.recovery.outcome import WorseModelWarning


WAYS = {"full": {"train": "full", "lora": {}}, "scales": {"train": "scales", "lora": {}}}
CONSUMERS = ("o_proj.weight", "down_proj.weight")


def settings(train, **fields):
    return recovery_config(**{"tokens": 288, **WAYS[train], **fields})


@pytest.fixture(scope="module")
def pruned():
    return prune_model(build("llama-tied"), config(), tokenizer())


@pytest.fixture(scope="module", params=[*WAYS])
def trained(request, pruned):
    model = recover(deepcopy(pruned), tokenizer(), settings(request.param))
    return request.param, model


def test_each_way_changes_only_what_it_says(trained, pruned):
    train, model = trained
    after = dict(model.named_parameters())
    changed = {name for name, before in pruned.named_parameters() if not torch.equal(before, after[name])}
    if train == "full":
        assert changed == {*after}
        return
    assert changed == {name for name in after if name.endswith(CONSUMERS) or "norm" in name}
    for name, before in pruned.named_parameters():
        if name.endswith(CONSUMERS):
            factors = after[name] / before
            torch.testing.assert_close(factors, factors[:1].expand_as(factors), rtol=1e-4, atol=1e-4)


def test_the_result_is_an_ordinary_model(trained, pruned, tmp_path):
    _, model = trained
    assert type(model) is type(pruned) and [*model.state_dict()] == [*pruned.state_dict()]
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.training == pruned.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert same_weights(again, model) and torch.equal(logits(again), logits(model))


def test_folded_scales_are_those_that_were_trained(trained, pruned, tmp_path):
    train, model = trained
    if train == "full":
        pytest.skip("there is nothing to fold")
    recovery = Recovery(settings(train, merge=False))
    apart = recovery.recover_model(deepcopy(pruned), tokenizer())
    torch.testing.assert_close(logits(apart), logits(model), rtol=1e-4, atol=1e-5)
    recovery.save(apart, tmp_path / "out")
    again = load_adapter(deepcopy(pruned), tmp_path / "out")
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-4, atol=1e-5)


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 4:
            raise KeyboardInterrupt


def test_it_can_be_interrupted_and_go_on(trained, pruned, tmp_path):
    train, expected = trained
    training = {"output_dir": str(tmp_path), "save_steps": 3, "save_total_limit": 9}
    model = deepcopy(pruned)
    model.model.norm.weight.requires_grad_(False)
    with pytest.raises(KeyboardInterrupt):
        Recovery(settings(train, training=training), callbacks=[Stop()]).recover_model(model, tokenizer())
    assert same_weights(model, pruned) and [*model.state_dict()] == [*pruned.state_dict()]
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert frozen == ["model.norm.weight"]
    resumed = recover(model, tokenizer(), settings(train, training=training), resume=True)
    torch.testing.assert_close(logits(resumed), logits(expected), rtol=1e-4, atol=1e-5)
    other = "scales" if train == "full" else "full"
    with (
        pytest.warns(UserWarning, match="is passed over"),
        pytest.raises(StructPruneError, match="There is no checkpoint in"),
    ):
        recover(deepcopy(pruned), tokenizer(), settings(other, training=training), resume=True)


@pytest.mark.parametrize("train", [*WAYS])
def test_a_learning_rate_that_spoils_the_model_is_told(train, pruned):
    with pytest.warns(WorseModelWarning, match="a learning rate below 30 may help"):
        recover(deepcopy(pruned), tokenizer(), settings(train, training={"learning_rate": 30.0}))


def test_what_belongs_to_another_way_is_refused(pruned):
    with pytest.raises(StructPruneError, match="belongs to train='lora', got train='scales'"):
        RecoveryConfig(train="scales", lora={"r": 4})
    with pytest.raises(StructPruneError, match="merge=False keeps an adapter apart, and train='full' trains"):
        RecoveryConfig(train="full", merge=False)
    with pytest.raises(StructPruneError, match="float16, which is too coarse"):
        recover(deepcopy(pruned).half(), tokenizer(), settings("full"))


@pytest.mark.parametrize("case", ["gpt2-tied", "mixtral"])
def test_scales_fold_into_every_layout(case):
    model = build(case)
    before = deepcopy(model)
    recover(model, tokenizer(), settings("scales", tokens=96))  # refuses a merged model that is another one
    assert [*model.state_dict()] == [*before.state_dict()] and not same_weights(model, before)
