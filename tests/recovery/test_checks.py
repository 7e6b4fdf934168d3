"""Mistakes in a recovery are found before any text is read."""

from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from accelerate import cpu_offload
from helpers import recovery_config, same_weights
from models import build, config, tokenizer
from torch import nn
from torch.distributed import HashStore, destroy_process_group, init_device_mesh, init_process_group
from torch.distributed.tensor import DTensor, distribute_tensor

from optimum_structprune import DomainConfig, StructPruneError, prune_model, recover
from optimum_structprune.recovery.checks import check_recovery, check_sharding
from optimum_structprune.recovery.trainer import take_over_, training_arguments
from optimum_structprune.system.processes import across_processes


def domain(**fields) -> dict:
    return {"domains": [DomainConfig(**{"name": "x", **fields})]}


def unread():
    pytest.fail("text was read")
    yield


@pytest.mark.parametrize(("fields", "message"), [
    ({"tokens": 40}, "tokens=40 does not give each of the 2 domains a sample of 24 tokens; 48 is enough"),
    ({"lora": {"rank": 4}}, "LoraConfig has no field 'rank'"),
    ({"lora": {"bias": 3, "task_type": "CAUSAL"}}, "LoraConfig: .*CAUSAL"),
    ({"training": {"learning_rat": 1}}, "TrainingArguments has no field 'learning_rat'. Did you mean"),
    ({"training": {"lr_scheduler_type": "sinus"}}, "TrainingArguments: .*sinus"),
    ({"training": {"max_steps": "x"}}, "TrainingArguments: .*max_steps' expected int, got str"),
    ({"training": {"bf16": "no"}}, "bf16' expected bool, got str"),
    ({"training": {"max_steps": True}}, "max_steps' expected int, got bool"),
    ({"training": {"fp16": True, "bf16": True}}, "TrainingArguments: At most one of fp16 and bf16"),
    ({"lora": {"r": 0}}, "r has to be 1 or more, got 0"),
    ({"lora": {"target_modules": ["nothing"]}}, "peft cannot put the adapter on LlamaForCausalLM: .*nothing"),
    ({"lora": {"target_modules": ["embed_tokens"]}}, "would train .*embed_tokens.weight, which is one tensor"),
    ({"lora": {"lora_dropout": 1.0}}, "lora_dropout has to lie between 0 and 1, got 1.0"),
    ({"training": {"per_device_train_batch_size": 0}}, "per_device_train_batch_size has to be 1 or more, got 0"),
    ({"training": {"learning_rate": -1.0}}, "learning_rate has to be 0 or more, got -1.0"),
    ({"training": {"eval_strategy": "steps"}}, "a recovery has none; leave them out"),
    ({"training": {"push_to_hub": True}}, "push_to_hub would upload"),
    (domain(source="preset:nothing"), "There is no preset 'nothing'"),
    (domain(source="./gone.txt"), "there is no file or folder gone.txt"),
    (domain(source="memory:list"), "set its source again"),
    ({"tokens": 2_000, "seq_length": 65}, "recovery's seq_length=65 is longer than the model's 64 positions"),
])  # fmt: skip
def test_mistakes(fields, message):
    with pytest.raises(StructPruneError, match=message):
        check_recovery(recovery_config(**fields), config(), build("llama-tied"))


def test_what_is_right_passes():
    for model in (None, build("llama-tied")):
        check_recovery(recovery_config(**domain(source=unread())), config(), model)
    check_recovery(recovery_config(**domain(source="self:prose")), config())
    check_recovery(recovery_config(tokens=96), config(rounds=3))
    # `no` is a text where a text is wanted.
    for value in (False, "no"):
        settings = recovery_config(training={"save_strategy": value, "learning_rate": 1, "logging_first_step": False})
        arguments = training_arguments(settings, 0, True, "nowhere")
        assert arguments.save_strategy == "no" and arguments.logging_first_step is False


def test_errors_of_other_libraries_in_training_are_ours():
    model = prune_model(build("llama-tied"), config(), tokenizer())
    before = deepcopy(model)
    for training in ({"lr_scheduler_kwargs": {"speed": 3}}, {"optim": "lomo"}):
        with pytest.raises(StructPruneError, match="(Training stopped at step 0|Trainer cannot be made): ") as caught:
            recover(model, tokenizer(), recovery_config(training=training))
        assert caught.value.__cause__ is not None and same_weights(model, before)


def test_only_causal_language_models_in_memory_are_trained():
    for case in ("bert", "t5"):
        for refused in (
            lambda model: recover(model, tokenizer(), recovery_config(**domain(source=unread()))),
            lambda model: check_recovery(recovery_config(), config(), model),
        ):
            with pytest.raises(StructPruneError, match="causal language models, and (Bert|T5)For"):
                refused(build(case))
    with pytest.raises(StructPruneError, match="takes a RecoveryConfig, got StructPruneConfig"):
        recover(build("llama-tied"), tokenizer(), config())
    model = cpu_offload(build("llama-tied"), execution_device=torch.device("cpu"))
    with pytest.raises(StructPruneError, match="LlamaForCausalLM is offloaded; leave recovery out, save, and"):
        check_recovery(recovery_config(), config(), model)


def test_what_does_not_shard_is_refused():
    for training, message in (
        ({"fsdp": True}, "fsdp shards a model over GPUs, and on 'cpu' accelerate ignores it"),
        ({"deepspeed": "zero3.json"}, "deepspeed is not supported"),
    ):
        with pytest.raises(StructPruneError, match=message):
            check_recovery(recovery_config(training=training), config(), build("llama-tied"))
    for settings, message in (({"version": 1}, "fsdp_config has version 1"), ({}, "and this one is alone")):
        arguments = SimpleNamespace(fsdp=True, fsdp_config=settings, world_size=2 if settings else 1)
        with pytest.raises(StructPruneError, match=message):
            check_sharding(arguments, "cuda")


@pytest.mark.parametrize(("variable", "name"), [("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "Deep")])
def test_a_launch_that_shards_is_refused(variable, name, monkeypatch):
    """Pruning in it would see empty weights in all processes but one."""
    monkeypatch.setenv(variable, "true")
    with pytest.raises(StructPruneError, match=f"accelerate was told to use {name}.*torchrun"):
        check_recovery(recovery_config(), config(), build("llama-tied"))
    with pytest.raises(StructPruneError, match=f"accelerate was told to use {name}"), across_processes():
        pass


def test_a_model_in_shards_is_not_pruned_and_what_was_trained_in_them_comes_back_whole():
    init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        sharded, mesh = build("llama-tied"), init_device_mesh("cpu", (1,))
        for name, parameter in list(sharded.named_parameters()):
            path, _, leaf = name.rpartition(".")
            setattr(sharded.get_submodule(path), leaf, nn.Parameter(distribute_tensor(parameter.detach(), mesh)))
        with pytest.raises(StructPruneError, match="weights of this LlamaForCausalLM are spread over processes"):
            prune_model(sharded, config())
        model = build("llama-tied")
        with torch.no_grad():
            model.model.norm.weight.zero_()
        model.lm_head.requires_grad_(False)
        take_over_(model, sharded)
    finally:
        destroy_process_group()
    for name, tensor in build("llama-tied").state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor)
        assert not isinstance(model.state_dict()[name], DTensor)
