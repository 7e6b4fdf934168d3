"""Mistakes in a recovery are found before any text is read."""

from copy import deepcopy

import pytest
import torch
from accelerate import cpu_offload
from helpers import recovery_config, same_weights, save_with_tokenizer, unread, with_tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from models import VOCAB, build, config, tokenizer
from torch import nn
from torch.distributed import HashStore, destroy_process_group, init_device_mesh, init_process_group
from torch.distributed.tensor import distribute_tensor
from transformers import AutoModelForCausalLM, BartConfig, BartForCausalLM, LlamaForCausalLM

from optimum_structprune import (
    Recovery,
    RecoveryConfig,
    StructPruner,
    across_processes,
    export_gguf,
    prune_model,
    recover,
)
from optimum_structprune.config.domains import DomainConfig
from optimum_structprune.errors import StructPruneError
from optimum_structprune.recovery.arguments import TrainingSize, computes_in_bf16, training_arguments
from optimum_structprune.recovery.recover import check_recovery
from optimum_structprune.recovery.teacher import load_teacher


def domain(**fields) -> dict:
    return {"domains": [DomainConfig(**{"name": "x", **fields})]}


@pytest.mark.parametrize(("fields", "message"), [
    ({"tokens": 40}, "`tokens`=40 is less than one sample of 24 tokens for each of the 2 domains. Set .* least 48"),
    ({"lora": {"rank": 4}}, "LoraConfig has no field 'rank'"),
    ({"lora": {"bias": 3, "task_type": "CAUSAL"}}, "LoraConfig: .*CAUSAL"),
    ({"training": {"learning_rat": 1}}, "TrainingArguments has no field 'learning_rat'. Did you mean"),
    ({"training": {"lr_scheduler_type": "sinus"}}, "TrainingArguments: .*sinus"),
    ({"lora": {"r": 0}}, "peft cannot put the adapter on LlamaForCausalLM: .*the value passed is 0"),
    ({"training": {"deepspeed": "zero3.json"}}, "has deepspeed, but .*attach_teacher"),
    ({"training": {"fsdp": True}}, "has fsdp, but .*attach_teacher"),
    (domain(source="preset:nothing"), "The preset 'nothing' does not exist"),
    (domain(source="memory:list"), "Set its source again"),
    ({"tokens": 2_000, "seq_length": 65}, "recovery's seq_length=65 is longer than the model's 64 positions"),
])  # fmt: skip
def test_mistakes(fields, message):
    with pytest.raises(StructPruneError, match=message):
        check_recovery(recovery_config(**fields), config(), build("llama-tied"))


def test_models_whose_weights_cannot_change_and_compiled_ones_are_refused():
    with torch.inference_mode():
        fixed = LlamaForCausalLM(build("llama-tied").config)
    for model, message in (
        (torch.compile(build("llama-tied"), backend="eager"), "model is compiled; pass `model._orig_mod`"),
        (fixed, "inside torch.inference_mode.*pass copy.deepcopy"),
        ("a/folder", "`model` must be a transformers model, got str"),
    ):
        with pytest.raises(StructPruneError, match=message):
            recover(model, tokenizer(), recovery_config(**domain(source=unread())))
    with pytest.raises(StructPruneError, match="model is compiled; pass `model._orig_mod`"):
        export_gguf(torch.compile(build("llama-tied"), backend="eager"), "nowhere.gguf", tokenizer())


def arguments_of(config, samples=1_000, validation=4, on_cpu=True):
    return training_arguments(config, TrainingSize(samples, 24, validation), 0, on_cpu, "scratch")


def test_no_checkpoints_are_no_to_yaml_too():
    arguments = arguments_of(recovery_config(training={"save_strategy": False}))
    assert arguments.save_strategy == arguments.eval_strategy == "no" and not arguments.load_best_model_at_end


def test_the_batch_grows_with_the_tokens_and_evaluations_take_a_tenth_of_the_time():
    steps = {}
    for samples in (20, 200, 2_000, 20_000, 200_000):
        arguments = arguments_of(RecoveryConfig(), samples)
        batch = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
        steps[samples] = arguments.max_steps
        assert arguments.max_steps * batch >= samples and batch <= 64
        # Samples of an evaluation cost half of a training sample.
        evaluations = arguments.max_steps // arguments.eval_steps
        assert evaluations == 1 or evaluations * 4 * 0.5 <= 0.1 * samples
    assert steps[20] == 20 and 150 <= steps[2_000] <= 250 and steps[200_000] > 1_000


def test_mixed_precision_is_the_default_where_the_cpu_computes_in_it(monkeypatch):
    for supported in (True, False):
        for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
            monkeypatch.setattr(torch.cpu, name, lambda value=supported: value)
        assert computes_in_bf16("cpu") is supported
        assert arguments_of(RecoveryConfig()).bf16 is supported
        assert not arguments_of(RecoveryConfig(training={"bf16": False})).bf16
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported")
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported")
    assert not computes_in_bf16("cpu")


@pytest.mark.parametrize("training", [
    {"report_to": "nothing"}, {"save_strategy": "best"}, {"lr_scheduler_kwargs": {"speed": 3}}, {"optim": "lomo"},
    {"per_device_train_batch_size": 0}, {"learning_rate": -1.0}, {"gradient_accumulation_steps": 0},
    {"optim": "lomo", "learning_rate": None},
])  # fmt: skip
def test_what_other_libraries_refuse_leaves_the_model_as_it_was(pruned, small, training):
    with pytest.raises(StructPruneError, match="TrainingArguments: |stopped at step 0, .*The model is as it was"):
        recover(pruned, tokenizer(), recovery_config(tokens=96, training=training))
    assert same_weights(pruned, small) and [*pruned.state_dict()] == [*small.state_dict()]


def test_only_causal_language_models_in_memory_are_trained():
    for case in ("bert", "t5"):
        for refused in (
            lambda model: recover(model, tokenizer(), recovery_config(**domain(source=unread()))),
            lambda model: check_recovery(recovery_config(), config(), model),
        ):
            with pytest.raises(StructPruneError, match="causal language models, and (Bert|T5)For.*own loss"):
                refused(build(case))
    with pytest.raises(StructPruneError, match="must be a RecoveryConfig, got StructPruneConfig"):
        recover(build("llama-tied"), tokenizer(), config())
    model = cpu_offload(build("llama-tied"), execution_device=torch.device("cpu"))
    with pytest.raises(StructPruneError, match="LlamaForCausalLM is offloaded. Prune without recovery, save, and"):
        check_recovery(recovery_config(), config(), model)


@pytest.mark.parametrize(("variable", "name"), [("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "Deep")])
def test_a_launch_that_shards_is_refused(variable, name, monkeypatch):
    """Pruning in it would see empty weights in all processes but one."""
    monkeypatch.setenv(variable, "true")
    with pytest.raises(StructPruneError, match=f"accelerate is set to use {name}.*torchrun"):
        check_recovery(recovery_config(), config(), build("llama-tied"))
    with pytest.raises(StructPruneError, match=f"accelerate is set to use {name}"), across_processes():
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


# --- a teacher has the same tokens, is another model, and predicts something
@pytest.mark.slow
@settings(max_examples=40)
@given(data=st.data())
def test_a_teacher_is_refused_where_an_id_means_another_token(data):
    """Both have some of 96 tokens; what is left of the teacher's in their order can be compared, and nothing else."""
    dense, special = build("llama-tied"), [0, 1, 2]
    taught = special + data.draw(st.lists(st.sampled_from(range(3, VOCAB)), min_size=2, unique=True))
    left = [token for token in taught[3:] if data.draw(st.booleans())]
    order = data.draw(st.just(left) | st.permutations(left))
    others = sorted({*range(3, VOCAB)} - {*taught}) or [95]
    more = data.draw(st.just([]) | st.lists(st.sampled_from(others), max_size=1))
    learnt = special + order + [token for token in more if token not in order]
    teacher, theirs = with_tokens(dense, tokenizer(), taught)
    model, own = with_tokens(dense, tokenizer(), learnt)
    before = deepcopy(teacher)
    with torch.no_grad():
        model.model.norm.weight.mul_(2)  # a teacher with the weights of the student is refused
    if learnt == taught:
        assert load_teacher(teacher, model, own, theirs).alignment is None
    else:  # a token that is no word of others cannot be spelled by them
        numbers = f"vocabulary of {len(taught)} tokens .* one of {len(learnt)}, and by"
        fewer = learnt == [token for token in taught if token in learnt]
        with pytest.raises(StructPruneError, match="of the kind WordLevel" if fewer else numbers):
            load_teacher(teacher, model, own, theirs)
    assert same_weights(teacher, before)


def test_rows_without_a_token_make_no_difference():
    """As embeddings of several sizes are padded to several multiples, with the same tokenizer."""
    wide, narrow = build("llama-tied"), build("llama-tied")
    wide.resize_token_embeddings(128)
    narrow.resize_token_embeddings(104)
    assert load_teacher(wide, narrow, tokenizer(), tokenizer()).alignment.spellings[-1] == ()
    assert load_teacher(narrow, wide, tokenizer(), tokenizer()).alignment.size == 128


def test_the_tokens_of_a_teacher_are_those_of_its_folder_or_its_run_unless_a_tokenizer_is_passed(pruned, tmp_path):
    other, renumbered = with_tokens(build("llama-tied"), tokenizer(), [0, 1, 2, *range(VOCAB - 1, 2, -1)])
    save_with_tokenizer(other, tmp_path, renumbered)
    by_run = build("llama-tied", seed=1)
    StructPruner(config()).prune_model(by_run, renumbered)
    for teacher in (str(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path), by_run):
        with pytest.raises(StructPruneError, match="by the same ids they mean other tokens"):
            recover(pruned, tokenizer(), recovery_config(), teacher=teacher)
    with pytest.raises(StructPruneError, match="by the same ids they mean other tokens"):
        recover(pruned, tokenizer(), recovery_config(), teacher=other, teacher_tokenizer=renumbered)
    # Of a model in memory nothing is known; who passes it says that it has the same tokens.
    assert load_teacher(other, pruned, tokenizer()).model is other
    assert load_teacher(by_run, pruned, tokenizer(), tokenizer()).model is by_run


def test_a_model_does_not_teach_itself(tmp_path):
    save_with_tokenizer(build("llama-tied"), tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    for teacher in (model, str(tmp_path), tmp_path):
        with pytest.raises(StructPruneError, match="`teacher` and the trained model are the same model"):
            recover(model, tokenizer(), recovery_config(), teacher=teacher)
    model.model.norm.weight.data.mul_(1.1)  # the folder holds another model by then
    assert load_teacher(str(tmp_path), model, tokenizer()).model.name_or_path == str(tmp_path)


def test_what_is_no_causal_language_model_is_no_teacher(pruned):
    for teacher in (3, build("bert"), torch.nn.Linear(2, 2), build("t5")):
        with pytest.raises(StructPruneError, match=f"`teacher` must be a causal .* got {type(teacher).__name__}"):
            recover(pruned, tokenizer(), recovery_config(), teacher=teacher)


def test_a_teacher_whose_base_does_not_say_what_it_takes():
    sizes = {"vocab_size": VOCAB, "d_model": 32, "decoder_layers": 1}
    sizes |= {"decoder_ffn_dim": 32, "decoder_attention_heads": 2}
    teacher, student = (BartForCausalLM(BartConfig(**sizes, is_decoder=True, is_encoder_decoder=False)) for _ in "12")
    recovery = Recovery(recovery_config(tokens=96))
    recovery.recover_model(student, tokenizer(), teacher)
    assert recovery.report.domains["a"].divergence.recovered > 0


def test_a_compiled_teacher_is_the_model_in_it():
    dense = build("llama-tied")
    assert load_teacher(torch.compile(dense, backend="eager"), build("llama-tied", seed=1), tokenizer()).model is dense
