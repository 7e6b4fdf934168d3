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
from transformers import AutoModelForCausalLM, BartConfig, BartForCausalLM, LlamaForCausalLM, TrainingArguments

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
from optimum_structprune.distillation.teacher import load_teacher
from optimum_structprune.recovery.arguments import TrainingSize, computes_in_bf16, training_arguments
from optimum_structprune.recovery.recover import check_recovery
from optimum_structprune.system.errors import StructPruneError


BATCH_SIZE = "per_device_train_batch_size"


def domain(source) -> dict:
    return {"domains": [DomainConfig(name="x", source=source)]}


@pytest.mark.parametrize(("fields", "message"), [
    ({"tokens": 40}, "`tokens`=40 is less than one sample of 24 tokens for each of the 2 domains. Set .* least 48"),
    ({"lora": {"rank": 4}}, "LoraConfig has no field 'rank'"),
    ({"lora": {"bias": 3, "task_type": "CAUSAL"}}, "LoraConfig: .*CAUSAL"),
    ({"training": {"learning_rat": 1}}, "TrainingArguments has no field 'learning_rat'. Did you mean"),
    ({"training": {"lr_scheduler_type": "sinus"}}, "TrainingArguments: .*sinus"),
    ({"lora": {"r": 0}}, "peft cannot put the adapter on LlamaForCausalLM: .*the value passed is 0"),
    ({"training": {"per_device_eval_batch_size": 0}}, "`per_device_eval_batch_size` must be at least 1, got 0"),
    ({"training": {BATCH_SIZE: "auto"}}, f"`{BATCH_SIZE}` in `training` must be a positive number, got 'auto'"),
    ({"training": {BATCH_SIZE: 0}}, f"`{BATCH_SIZE}` in `training` must be a positive number, got 0"),
    ({"training": {"num_train_epochs": "3"}}, "`num_train_epochs` in `training` must be a positive number, got '3'"),
    ({"training": {"max_steps": "10"}}, "`max_steps` in `training` must be a number, got '10'"),
    ({"training": {"learning_rate": "1e-3"}}, "`learning_rate` in `training` must be a number, got '1e-3'"),
    ({"training": {"save_steps": "5"}}, "`save_steps` in `training` must be a number, got '5'"),
    ({"training": {"eval_delay": True}}, "`eval_delay` in `training` must be a number, got True"),
    ({"training": {"gradient_accumulation_steps": 0}}, "`gradient_accumulation_steps` .* a positive number, got 0"),
    ({"training": {"neftune_noise_alpha": 5.0}}, "neftune_noise_alpha, whose hook would stay"),
    ({"training": {"deepspeed": "zero3.json"}}, "has deepspeed, but .*attach_teacher"),
    ({"training": {"fsdp": True}}, "has fsdp, but .*attach_teacher"),
    (domain("preset:nothing"), "The preset 'nothing' does not exist"),
    (domain("memory:list"), "Set its source again"),
    ({"tokens": 2_000, "seq_length": 65}, "recovery's seq_length=65 is longer than the model's 64 positions"),
])  # fmt: skip
def test_mistakes_are_refused(fields, message):
    with pytest.raises(StructPruneError, match=message):
        check_recovery(recovery_config(**fields), config(), build("llama-tied"))


def test_a_trimmed_model_in_float16_is_refused_on_a_cpu():
    pruning = config(widths={"mlp": 24, "vocab": 80})
    model = build("llama-tied").half()
    with pytest.raises(StructPruneError, match="Load the model in bfloat16 or float32"):
        check_recovery(recovery_config(), pruning, model)

    check_recovery(recovery_config(), pruning, model.bfloat16())
    check_recovery(recovery_config(), config(), model.half())


def test_models_whose_weights_cannot_change_and_compiled_ones_are_refused():
    with torch.inference_mode():
        inference_model = LlamaForCausalLM(build("llama-tied").config)
    compiled = torch.compile(build("llama-tied"), backend="eager")

    for model, message in (
        (compiled, "`model` is compiled. Pass `model._orig_mod`"),
        (inference_model, "inside torch.inference_mode.*pass `copy.deepcopy"),
        ("a/folder", "`model` must be a transformers model, got str"),
    ):
        with pytest.raises(StructPruneError, match=message):
            recover(model, tokenizer(), recovery_config(**domain(unread())))
    with pytest.raises(StructPruneError, match="`model` is compiled. Pass `model._orig_mod`"):
        export_gguf(compiled, "nowhere.gguf", tokenizer())


def arguments_of(config, samples=1_000, validation=4, on_cpu=True):
    return training_arguments(config, TrainingSize(samples, 24, validation), 0, on_cpu, "scratch")


def test_false_means_no_where_an_argument_takes_no():
    """YAML reads `no` as false."""
    arguments = arguments_of(recovery_config(training={"eval_strategy": False, "logging_strategy": False}))
    assert arguments.eval_strategy == "no"
    assert arguments.logging_strategy == "no"
    assert arguments.save_strategy == "steps"
    assert not arguments.load_best_model_at_end


def test_a_false_save_strategy_means_no_checkpoints():
    """YAML reads `no` as false."""
    arguments = arguments_of(recovery_config(training={"save_strategy": False}))
    assert arguments.save_strategy == "no"
    assert arguments.eval_strategy == "no"
    assert not arguments.load_best_model_at_end


def test_the_batch_grows_with_the_tokens_and_evaluations_need_a_tenth_of_the_time():
    steps = {}
    for samples in (20, 200, 2_000, 20_000, 200_000):
        arguments = arguments_of(RecoveryConfig(), samples)
        batch = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
        steps[samples] = arguments.max_steps
        assert arguments.max_steps * batch >= samples
        assert batch <= 64

        # A sample of an evaluation costs half as much as a training sample.
        evaluations = arguments.max_steps // arguments.eval_steps
        assert evaluations == 1 or evaluations * 4 * 0.5 <= 0.1 * samples

    assert steps[20] == 20
    assert steps[200] == 200
    assert 600 <= steps[2_000] <= 1_000
    assert steps[200_000] > 1_000


@pytest.mark.parametrize("samples", [1_600, 9_600, 100_000])
def test_processes_share_the_samples_of_a_step(samples, monkeypatch):
    single = arguments_of(RecoveryConfig(), samples)
    batch = single.per_device_train_batch_size * single.gradient_accumulation_steps

    for processes in (2, 4):
        monkeypatch.setattr(TrainingArguments, "world_size", processes)
        arguments = arguments_of(RecoveryConfig(), samples)
        per_process = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps

        assert per_process * processes == max(batch, processes)
        assert arguments.max_steps == -(-samples // max(batch, processes))


def test_mixed_precision_is_the_default_if_the_cpu_supports_it(monkeypatch):
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
    {"learning_rate": -1.0}, {"optim": "lomo", "learning_rate": None},
])  # fmt: skip
def test_errors_of_other_libraries_leave_the_model_unchanged(pruned, small, training):
    with pytest.raises(StructPruneError, match="TrainingArguments: |stopped at step 0, .*The model is as it was"):
        recover(pruned, tokenizer(), recovery_config(tokens=96, training=training))

    assert same_weights(pruned, small)
    assert list(pruned.state_dict()) == list(small.state_dict())


@pytest.mark.parametrize("case", ["t5", "vit"])
def test_models_that_read_more_than_text_are_not_trained(case):
    message = "read text alone, and (ViT|T5)For.* needs other inputs too"
    with pytest.raises(StructPruneError, match=message):
        recover(build(case), tokenizer(), recovery_config(**domain(unread())))
    with pytest.raises(StructPruneError, match=message):
        check_recovery(recovery_config(), config(), build(case))


def test_a_config_of_another_class_is_refused():
    with pytest.raises(StructPruneError, match="must be a RecoveryConfig, got StructPruneConfig"):
        recover(build("llama-tied"), tokenizer(), config())


def test_an_offloaded_model_is_not_trained():
    model = cpu_offload(build("llama-tied"), execution_device=torch.device("cpu"))
    with pytest.raises(StructPruneError, match="LlamaForCausalLM is offloaded. Prune without recovery, save, and"):
        check_recovery(recovery_config(), config(), model)


@pytest.mark.parametrize(("variable", "name"), [("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "Deep")])
def test_a_launch_that_shards_is_refused(variable, name, monkeypatch):
    """All processes except one would see empty weights in such a launch."""
    monkeypatch.setenv(variable, "true")

    with pytest.raises(StructPruneError, match=f"accelerate is set to use {name}.*torchrun"):
        check_recovery(recovery_config(), config(), build("llama-tied"))
    with pytest.raises(StructPruneError, match=f"accelerate is set to use {name}"), across_processes():
        pass


def test_a_sharded_model_is_not_pruned():
    init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        sharded = build("llama-tied")
        mesh = init_device_mesh("cpu", (1,))
        for name, parameter in list(sharded.named_parameters()):
            path, _, leaf = name.rpartition(".")
            shard = nn.Parameter(distribute_tensor(parameter.detach(), mesh))
            setattr(sharded.get_submodule(path), leaf, shard)

        with pytest.raises(StructPruneError, match="LlamaForCausalLM are spread over processes"):
            prune_model(sharded, config())
    finally:
        destroy_process_group()


# --- a teacher has the same tokens, is another model, and is a causal language model
def draw_tokens(data):
    """Draw the tokens of a teacher and of a student, which may have lost, reordered and added tokens."""
    special = [0, 1, 2]
    teacher_words = data.draw(st.lists(st.sampled_from(range(3, VOCAB)), min_size=2, unique=True))
    shared_words = [token for token in teacher_words if data.draw(st.booleans())]
    student_words = list(data.draw(st.just(shared_words) | st.permutations(shared_words)))

    foreign_words = sorted(set(range(3, VOCAB)) - set(teacher_words)) or [95]
    added_words = data.draw(st.just([]) | st.lists(st.sampled_from(foreign_words), max_size=1))
    student_words += [token for token in added_words if token not in student_words]
    return special + teacher_words, special + student_words


@pytest.mark.slow
@settings(max_examples=40)
@given(data=st.data())
def test_a_teacher_is_refused_if_an_id_means_another_token(data):
    """A teacher is compatible only if the student's tokens are a subset of its tokens in the same order."""
    original = build("llama-tied")
    teacher_tokens, student_tokens = draw_tokens(data)
    teacher, teacher_reader = with_tokens(original, tokenizer(), teacher_tokens)
    student, student_reader = with_tokens(original, tokenizer(), student_tokens)
    original_teacher = deepcopy(teacher)
    with torch.no_grad():
        student.model.norm.weight.mul_(2)  # a teacher with the weights of the student is refused

    if student_tokens == teacher_tokens:
        assert load_teacher(teacher, student, student_reader, teacher_reader).alignment is None
    else:
        message = f"vocabulary of {len(teacher_tokens)} tokens .* one of {len(student_tokens)}, and by"
        if student_tokens == [token for token in teacher_tokens if token in student_tokens]:
            message = "of the kind WordLevel"  # words cannot be spelled with other words
        with pytest.raises(StructPruneError, match=message):
            load_teacher(teacher, student, student_reader, teacher_reader)
    assert same_weights(teacher, original_teacher)


def test_rows_without_a_token_make_no_difference():
    """Embeddings for the same tokenizer may be padded to different sizes."""
    wide = build("llama-tied")
    narrow = build("llama-tied")
    wide.resize_token_embeddings(128)
    narrow.resize_token_embeddings(104)

    assert load_teacher(wide, narrow, tokenizer(), tokenizer()).alignment.spellings[-1] == ()
    assert load_teacher(narrow, wide, tokenizer(), tokenizer()).alignment.size == 128


def test_a_teachers_tokens_are_known_from_its_folder_its_run_or_its_tokenizer(pruned, tmp_path):
    renumbered_tokens = [0, 1, 2, *range(VOCAB - 1, 2, -1)]
    renumbered, renumbered_reader = with_tokens(build("llama-tied"), tokenizer(), renumbered_tokens)
    save_with_tokenizer(renumbered, tmp_path, renumbered_reader)
    pruned_before = build("llama-tied", seed=1)
    StructPruner(config()).prune_model(pruned_before, renumbered_reader)

    message = "by the same ids they mean other tokens"
    for teacher in (str(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path), pruned_before):
        with pytest.raises(StructPruneError, match=message):
            recover(pruned, tokenizer(), recovery_config(), teacher=teacher)
    with pytest.raises(StructPruneError, match=message):
        recover(pruned, tokenizer(), recovery_config(), teacher=renumbered, teacher_tokenizer=renumbered_reader)

    # The tokens of a model in memory are unknown, so its user is responsible for them.
    assert load_teacher(renumbered, pruned, tokenizer()).model is renumbered
    assert load_teacher(pruned_before, pruned, tokenizer(), tokenizer()).model is pruned_before


def test_a_model_does_not_teach_itself(tmp_path):
    save_with_tokenizer(build("llama-tied"), tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    for teacher in (model, str(tmp_path), tmp_path):
        with pytest.raises(StructPruneError, match="`teacher` and the trained model are the same model"):
            recover(model, tokenizer(), recovery_config(), teacher=teacher)

    model.model.norm.weight.data.mul_(1.1)  # now the model differs from its folder
    assert load_teacher(str(tmp_path), model, tokenizer()).model.name_or_path == str(tmp_path)


def test_a_teacher_that_is_no_causal_language_model_is_refused(pruned):
    for teacher in (3, build("bert"), torch.nn.Linear(2, 2), build("t5")):
        with pytest.raises(StructPruneError, match=f"`teacher` must be a causal .* got {type(teacher).__name__}"):
            recover(pruned, tokenizer(), recovery_config(), teacher=teacher)


def test_a_teacher_whose_base_model_has_a_generic_signature_is_supported():
    bart_config = BartConfig(
        vocab_size=VOCAB,
        d_model=32,
        decoder_layers=1,
        decoder_ffn_dim=32,
        decoder_attention_heads=2,
        is_decoder=True,
        is_encoder_decoder=False,
    )
    teacher = BartForCausalLM(bart_config)
    student = BartForCausalLM(bart_config)
    recovery = Recovery(recovery_config(tokens=96))
    recovery.recover_model(student, tokenizer(), teacher)

    assert recovery.report.domains["a"].divergence.recovered > 0


def test_a_compiled_teacher_is_unwrapped():
    original = build("llama-tied")
    compiled = torch.compile(original, backend="eager")
    assert load_teacher(compiled, build("llama-tied", seed=1), tokenizer()).model is original
