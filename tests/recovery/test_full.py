"""Training all weights: what it changes, and that the result is an ordinary model."""

from copy import deepcopy

import pytest
import torch
from helpers import logits, recovery_config, same_weights
from models import build, config, tokenizer
from transformers import AutoModelForCausalLM, TrainerCallback

from optimum_structprune import Recovery, RecoveryConfig, StructPruneError, prune_model, recover


def settings(**fields):
    return recovery_config(**{"tokens": 288, "train": "full", "lora": {}, **fields})


@pytest.fixture(scope="module")
def pruned():
    return prune_model(build("llama-tied"), config(), tokenizer())


@pytest.fixture(scope="module")
def trained(pruned):
    return recover(deepcopy(pruned), tokenizer(), settings())


def test_the_result_is_an_ordinary_model_with_other_weights(trained, pruned, tmp_path):
    after = dict(trained.named_parameters())
    assert not any(torch.equal(before, after[name]) for name, before in pruned.named_parameters())
    assert type(trained) is type(pruned) and [*trained.state_dict()] == [*pruned.state_dict()]
    assert trained.lm_head.weight is trained.model.embed_tokens.weight and trained.training == pruned.training
    assert all(p.requires_grad and p.grad is None for p in trained.parameters())
    trained.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert same_weights(again, trained) and torch.equal(logits(again), logits(trained))


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 4:
            raise KeyboardInterrupt


def test_it_can_be_interrupted_and_go_on(trained, pruned, tmp_path):
    training = {"output_dir": str(tmp_path), "save_steps": 3, "save_total_limit": 9}
    model = deepcopy(pruned)
    model.model.norm.weight.requires_grad_(False)
    with pytest.raises(KeyboardInterrupt):
        Recovery(settings(training=training), callbacks=[Stop()]).recover_model(model, tokenizer())
    assert same_weights(model, pruned) and [*model.state_dict()] == [*pruned.state_dict()]
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert frozen == ["model.norm.weight"]
    resumed = recover(model, tokenizer(), settings(training=training), resume=True)
    torch.testing.assert_close(logits(resumed), logits(trained), rtol=1e-4, atol=1e-5)


def test_what_belongs_to_another_way_is_refused(pruned):
    with pytest.raises(StructPruneError, match="belongs to train='lora', got train='full'"):
        RecoveryConfig(train="full", lora={"r": 4})
    with pytest.raises(StructPruneError, match="merge=False keeps an adapter apart, and train='full' trains"):
        RecoveryConfig(train="full", merge=False)
    with pytest.raises(StructPruneError, match="float16, which is too coarse"):
        recover(deepcopy(pruned).half(), tokenizer(), settings())
