"""Mistakes in a recovery are found before any text is read."""

from copy import deepcopy

import pytest
import torch
from accelerate import cpu_offload
from helpers import recovery_config, same_weights, unread
from models import build, config, tokenizer
from torch import nn
from torch.distributed import HashStore, destroy_process_group, init_device_mesh, init_process_group
from torch.distributed.tensor import distribute_tensor
from transformers import LlamaForCausalLM

from optimum_structprune import DomainConfig, StructPruneError, export_gguf, prune_model, recover
from optimum_structprune.recovery.recover import check_recovery
from optimum_structprune.system.processes import across_processes


def domain(**fields) -> dict:
    return {"domains": [DomainConfig(**{"name": "x", **fields})]}


@pytest.mark.parametrize(("fields", "message"), [
    ({"tokens": 40}, "tokens=40 does not give each of the 2 domains a sample of 24 tokens; 48 is enough"),
    ({"lora": {"rank": 4}}, "LoraConfig has no field 'rank'"),
    ({"lora": {"bias": 3, "task_type": "CAUSAL"}}, "LoraConfig: .*CAUSAL"),
    ({"training": {"learning_rat": 1}}, "TrainingArguments has no field 'learning_rat'. Did you mean"),
    ({"training": {"lr_scheduler_type": "sinus"}}, "TrainingArguments: .*sinus"),
    ({"training": {"fp16": True, "bf16": True}}, "TrainingArguments: At most one of fp16 and bf16"),
    ({"lora": {"r": 0}}, "peft cannot put the adapter on LlamaForCausalLM: .*the value passed is 0"),
    ({"lora": {"target_modules": ["nothing"]}}, "peft cannot put the adapter on LlamaForCausalLM: .*nothing"),
    ({"lora": {"target_modules": ["embed_tokens"]}}, "would train .*embed_tokens.weight, which is one tensor"),
    ({"training": {"eval_strategy": "epoch"}}, "TrainingArguments: .*strategy to match"),
    ({"training": {"deepspeed": "zero3.json"}}, "deepspeed is not supported"),
    ({"training": {"fsdp": True}}, "fsdp is not supported"),
    (domain(source="preset:nothing"), "There is no preset 'nothing'"),
    (domain(source="./gone.txt"), "there is no file or folder gone.txt"),
    (domain(source="memory:list"), "set its source again"),
    ({"tokens": 2_000, "seq_length": 65}, "recovery's seq_length=65 is longer than the model's 64 positions"),
])  # fmt: skip
def test_mistakes(fields, message):
    with pytest.raises(StructPruneError, match=message):
        check_recovery(recovery_config(**fields), config(), build("llama-tied"))


def test_what_is_right_passes():
    model = build("llama-tied")
    check_recovery(recovery_config(**domain(source=unread())), config(), model)
    check_recovery(recovery_config(**domain(source="self:prose")), config(), model)
    check_recovery(recovery_config(tokens=96), config(rounds=3), model)
    check_recovery(recovery_config(training={"save_strategy": "no", "learning_rate": 1}), config(), model)


def test_models_whose_weights_cannot_change_and_compiled_ones_are_refused():
    with torch.inference_mode():
        fixed = LlamaForCausalLM(build("llama-tied").config)
    for model, message in (
        (torch.compile(build("llama-tied"), backend="eager"), "model is compiled; pass `model._orig_mod`"),
        (fixed, "inside torch.inference_mode.*pass copy.deepcopy"),
    ):
        with pytest.raises(StructPruneError, match=message):
            recover(model, tokenizer(), recovery_config(**domain(source=unread())))
    with pytest.raises(StructPruneError, match="model is compiled; pass `model._orig_mod`"):
        export_gguf(torch.compile(build("llama-tied"), backend="eager"), "nowhere.gguf", tokenizer())


@pytest.mark.parametrize("training", [
    {"report_to": "nothing"}, {"save_strategy": "best"}, {"lr_scheduler_kwargs": {"speed": 3}}, {"optim": "lomo"},
    {"per_device_train_batch_size": 0}, {"learning_rate": -1.0}, {"remove_unused_columns": True},
    {"torch_compile": True},
])  # fmt: skip
def test_what_other_libraries_refuse_leaves_the_model_as_it_was(training):
    model = prune_model(build("llama-tied"), config(), tokenizer())
    before = deepcopy(model)
    with pytest.raises(StructPruneError, match="TrainingArguments: |stopped at step 0, .*The model is as it was"):
        recover(model, tokenizer(), recovery_config(tokens=96, training=training))
    assert same_weights(model, before) and [*model.state_dict()] == [*before.state_dict()]


def test_only_causal_language_models_in_memory_are_trained():
    for case in ("bert", "t5"):
        for refused in (
            lambda model: recover(model, tokenizer(), recovery_config(**domain(source=unread()))),
            lambda model: check_recovery(recovery_config(), config(), model),
        ):
            with pytest.raises(StructPruneError, match="causal language models, and (Bert|T5)For.* own loss"):
                refused(build(case))
    with pytest.raises(StructPruneError, match="takes a RecoveryConfig, got StructPruneConfig"):
        recover(build("llama-tied"), tokenizer(), config())
    model = cpu_offload(build("llama-tied"), execution_device=torch.device("cpu"))
    with pytest.raises(StructPruneError, match="LlamaForCausalLM is offloaded; leave recovery out, save, and"):
        check_recovery(recovery_config(), config(), model)


@pytest.mark.parametrize(("variable", "name"), [("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "Deep")])
def test_a_launch_that_shards_is_refused(variable, name, monkeypatch):
    """Pruning in it would see empty weights in all processes but one."""
    monkeypatch.setenv(variable, "true")
    with pytest.raises(StructPruneError, match=f"accelerate was told to use {name}.*torchrun"):
        check_recovery(recovery_config(), config(), build("llama-tied"))
    with pytest.raises(StructPruneError, match=f"accelerate was told to use {name}"), across_processes():
        pass


def test_a_model_in_shards_is_not_pruned():
    init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        sharded, mesh = build("llama-tied"), init_device_mesh("cpu", (1,))
        for name, parameter in list(sharded.named_parameters()):
            path, _, leaf = name.rpartition(".")
            setattr(sharded.get_submodule(path), leaf, nn.Parameter(distribute_tensor(parameter.detach(), mesh)))
        with pytest.raises(StructPruneError, match="LlamaForCausalLM are spread over processes"):
            prune_model(sharded, config())
    finally:
        destroy_process_group()
