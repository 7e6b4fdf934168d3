"""A Trainer with a teacher minimises the KL divergence from the teacher, in one process and in several."""

import json
import re
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from datasets import Dataset, IterableDataset
from helpers import on_one_rank, on_two_ranks, same_weights
from models import build, config, documents, token_ids, tokenizer
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from torch.nn.functional import cross_entropy, kl_div
from transformers import (
    AutoModelForCausalLM,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

from optimum_structprune import StructPruneError, attach_pruner, attach_teacher, write_teacher
from optimum_structprune.arch.meta import is_offloaded
from optimum_structprune.distillation.teacher import load_teacher


LORA = LoraConfig(r=2, target_modules="all-linear")


def labelled_rows(count=16, length=16):
    """Return samples whose first labels are ignored, in different numbers."""
    rows = []
    for number, ids in enumerate(token_ids(count, length).tolist()):
        ignored = number % 5
        rows.append({"input_ids": ids, "labels": [-100] * ignored + ids[ignored:]})
    return rows


def trainer_for(model, folder, rows=None, trainer_class=Trainer, arguments_class=TrainingArguments, **settings):
    options = {
        "use_cpu": True,
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        "train_sampling_strategy": "sequential",
    }
    options.update(settings)
    rows = rows or labelled_rows()
    return trainer_class(
        model=model,
        args=arguments_class(str(folder), **options),
        train_dataset=rows,
        eval_dataset=rows[:8],
        data_collator=default_data_collator,
    )


def batch_of(rows):
    batch = {}
    for name in rows[0]:
        batch[name] = torch.tensor([row[name] for row in rows])
    return batch


def plain_loss(student, teacher, batch, temperature, task_weight):
    """Compute the loss by its formula, from all logits at once."""
    labels = batch["labels"][:, 1:]
    is_counted = labels != -100
    logits = student(batch["input_ids"]).logits[:, :-1][is_counted].float()
    with torch.no_grad():
        teacher_logits = teacher(batch["input_ids"]).logits[:, :-1][is_counted].float()

    log_student = (logits / temperature).log_softmax(-1)
    log_teacher = (teacher_logits / temperature).log_softmax(-1)
    kl = kl_div(log_student, log_teacher, log_target=True, reduction="batchmean")
    task = cross_entropy(logits, labels[is_counted])
    return (1 - task_weight) * temperature**2 * kl + task_weight * task


def gradients(model):
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


# The cases have plain tied and untied heads, and heads whose output is capped or scaled.
@pytest.mark.parametrize("case", ["llama-tied", "llama-untied", "gemma2", "granite", "cohere"])
@pytest.mark.parametrize("lora", [False, True])
def test_loss_and_gradients_equal_the_formula(case, lora, tmp_path, monkeypatch):
    monkeypatch.setattr("optimum_structprune.distillation.chunked_loss.MIN_CHUNK_TOKENS", 7)
    monkeypatch.setattr("optimum_structprune.distillation.chunked_loss.CHUNK_BYTES", {"cpu": 1})
    student = build(case)
    teacher = build(case, seed=1)
    if lora:
        student = get_peft_model(student, LORA)
    trainer = trainer_for(student, tmp_path)
    attach_teacher(trainer, teacher, temperature=2.0, task_weight=0.25)

    batch = batch_of(labelled_rows(4))
    student.train()
    for _ in range(2):  # the first batch detects whether the head is plain
        student.zero_grad()
        loss = trainer.compute_loss(student, dict(batch))
        loss.backward()
    computed = gradients(student)

    student.zero_grad()
    expected = plain_loss(student, teacher, batch, 2.0, 0.25)
    expected.backward()
    torch.testing.assert_close(loss, expected)
    assert computed
    assert computed.keys() == gradients(student).keys()
    for name, gradient in gradients(student).items():
        torch.testing.assert_close(computed[name], gradient, msg=name)


@pytest.mark.parametrize("case", ["llama-tied", "cohere"])
def test_a_first_batch_without_counted_tokens_changes_no_later_loss(case, tmp_path):
    """Losses of zero do not show whether the model scales the output of its head."""
    losses = []
    for starts_with_ignored_batch in (False, True):
        student = build(case)
        trainer = trainer_for(student, tmp_path)
        attach_teacher(trainer, build(case, seed=1))

        batch = batch_of(labelled_rows(4))
        if starts_with_ignored_batch:
            ignored = torch.full_like(batch["labels"], -100)
            assert trainer.compute_loss(student, batch | {"labels": ignored}) == 0
        losses.append(trainer.compute_loss(student, batch))

    assert losses[0] == losses[1]
    assert losses[0] > 0


def test_predictions_are_logits(tmp_path):
    student = build("llama-tied")
    rows = labelled_rows(4)
    plain = trainer_for(student, tmp_path).predict(rows)

    trainer = trainer_for(student, tmp_path)
    attach_teacher(trainer, build("llama-tied", seed=1))
    prediction = trainer.predict(rows)
    torch.testing.assert_close(torch.tensor(prediction.predictions), torch.tensor(plain.predictions))


def test_the_teacher_of_a_model_that_is_pruned_later_may_have_its_weights(tmp_path):
    model = build("llama-tied")
    trainer = trainer_for(model, tmp_path, labelled_rows(32, 24))
    trainer.processing_class = tokenizer()
    attach_pruner(trainer, config(widths={"mlp": 24}, num_samples=2), start=2)
    attach_teacher(trainer, deepcopy(model))
    trainer.train()
    assert trainer.model.config.intermediate_size == 24
    assert trainer.state.log_history[0]["kl"] < 1e-5
    assert trainer.state.log_history[3]["kl"] > 1e-3


def test_a_loaded_teacher_has_the_attention_implementation_of_the_model(tmp_path):
    build("llama-tied", seed=1).save_pretrained(tmp_path / "teacher")
    build("bloom", seed=1).save_pretrained(tmp_path / "other")
    model = build("llama-tied")

    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        teacher = load_teacher(tmp_path / "teacher", model)
        assert teacher.model.config._attn_implementation == implementation

    # A teacher of another type may not support this implementation.
    assert load_teacher(tmp_path / "other", model).model.config._attn_implementation == "eager"


def test_accumulated_batches_train_like_one_batch(tmp_path):
    """Samples count different numbers of tokens, so a mean of means would differ."""
    models = []
    for batch_size, accumulation in ((4, 1), (1, 4)):
        model = build("llama-tied")
        trainer = trainer_for(
            model,
            tmp_path,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            optim="sgd",
            learning_rate=1.0,
        )
        attach_teacher(trainer, build("llama-tied", seed=1))
        trainer.train()
        models.append(model)

    single, accumulated = models
    for name, weight in single.named_parameters():
        torch.testing.assert_close(weight, accumulated.get_parameter(name), atol=1e-6, rtol=1e-5)
    assert not same_weights(single, build("llama-tied"))


def test_logs_and_evaluations_have_the_divergence(tmp_path):
    model = build("llama-tied")
    trainer = trainer_for(model, tmp_path, max_steps=12)
    attach_teacher(trainer, build("llama-tied", seed=1), task_weight=0.05)

    original_metrics = trainer.evaluate()
    trainer.train()
    divergences = [log["kl"] for log in trainer.state.log_history if "loss" in log]
    metrics = trainer.evaluate()

    assert len(divergences) == 12
    assert divergences[-1] < divergences[0]
    assert metrics["eval_kl"] < original_metrics["eval_kl"]
    # The loss also contains the cross-entropy, and the logged divergence does not.
    assert metrics["eval_loss"] > metrics["eval_kl"]


def test_an_evaluation_excludes_earlier_losses(tmp_path):
    model = build("llama-tied")
    trainer = trainer_for(model, tmp_path)
    attach_teacher(trainer, build("llama-tied", seed=1))
    expected = trainer.evaluate()["eval_kl"]

    # A trial step computes a loss of other samples in eval mode.
    model.eval()
    batch = batch_of(labelled_rows(length=7)[8:])
    with torch.no_grad():
        assert trainer.compute_loss(model, batch).item() != pytest.approx(expected)

    assert trainer.evaluate()["eval_kl"] == expected


def test_liger_evaluates_without_logits(tmp_path):
    """With Liger's kernels, the Trainer asks for no logits, and the model raises an error if it gets no labels."""
    model = build("llama-tied")
    forward = model.forward

    def forward_of_liger(*args, skip_logits=None, labels=None, **kwargs):
        if skip_logits and labels is None:
            raise ValueError("skip_logits is True, but labels and shift_labels are None")
        return forward(*args, labels=labels, **kwargs)

    trainer = trainer_for(model, tmp_path, prediction_loss_only=True)
    attach_teacher(trainer, build("llama-tied", seed=1))
    expected = trainer.evaluate()["eval_kl"]

    model.forward = forward_of_liger
    trainer.args.use_liger_kernel = True
    assert trainer.evaluate()["eval_kl"] == expected


def trainer_of_six_steps(folder, callback=None):
    """Return a Trainer of six steps with a checkpoint after the third."""
    trainer = trainer_for(build("llama-tied"), folder, max_steps=6, save_strategy="steps", save_steps=3)
    attach_teacher(trainer, build("llama-tied", seed=1))
    if callback is not None:
        trainer.add_callback(callback)
    return trainer


class InterruptAfterFive(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 5:
            raise KeyboardInterrupt


def test_a_resumed_training_ends_with_the_weights_of_an_uninterrupted_one(tmp_path):
    uninterrupted = trainer_of_six_steps(tmp_path / "whole")
    uninterrupted.train()

    with pytest.raises(KeyboardInterrupt):
        trainer_of_six_steps(tmp_path / "half", InterruptAfterFive()).train()
    resumed = trainer_of_six_steps(tmp_path / "half")
    resumed.train(resume_from_checkpoint=True)

    assert same_weights(resumed.model, uninterrupted.model)
    assert not same_weights(resumed.model, build("llama-tied"))


def text_rows():
    for text in documents(200):
        yield {"text": text}


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*is deprecated:FutureWarning")
@pytest.mark.parametrize("settings", [
    {"packing": True},
    {"packing": True, "gradient_accumulation_steps": 2, "gradient_checkpointing": True},
    {"padding_free": False},
])  # fmt: skip
def test_the_sft_trainer_of_trl_streams_and_packs(settings, tmp_path):
    trl = pytest.importorskip("trl", reason="TRL is not installed")
    dataset = Dataset.from_list(list(text_rows()))
    evaluation_dataset = Dataset.from_list(list(text_rows())[:16])
    if "gradient_accumulation_steps" not in settings:
        dataset = IterableDataset.from_generator(text_rows)
    arguments = trl.SFTConfig(
        str(tmp_path),
        use_cpu=True,
        bf16=False,
        max_steps=8,
        per_device_train_batch_size=4,
        max_length=32,
        learning_rate=1e-2,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        **settings,
    )
    trainer = trl.SFTTrainer(
        model=build("llama-tied"),
        args=arguments,
        train_dataset=dataset,
        eval_dataset=evaluation_dataset,
        processing_class=tokenizer(),
        peft_config=LORA,
    )
    attach_teacher(trainer, build("llama-tied", seed=1))

    original_divergence = trainer.evaluate()["eval_kl"]
    trainer.train()
    assert trainer.evaluate()["eval_kl"] < original_divergence
    assert all("kl" in log for log in trainer.state.log_history if "loss" in log)


def test_a_teacher_in_bfloat16_or_offloaded_predicts_nearly_the_same(tmp_path):
    batch = batch_of(labelled_rows(4))
    losses = []
    for options in ({}, {"teacher_dtype": "bfloat16"}, {"teacher_device": "offload"}):
        model = build("llama-tied").eval()
        trainer = trainer_for(model, tmp_path)
        attach_teacher(trainer, build("llama-tied", seed=1), **options)
        losses.append(trainer.compute_loss(model, dict(batch)).item())

    plain, in_bfloat16, offloaded = losses
    assert in_bfloat16 == pytest.approx(plain, rel=0.02)
    assert in_bfloat16 != plain
    assert offloaded == plain


def test_a_teacher_with_hooks_of_accelerate_is_not_moved(tmp_path):
    """The hooks would move the inputs of each module to its first device after the weights have moved."""
    batch = batch_of(labelled_rows(4))
    for options in ({}, {"teacher_device": "offload"}):
        trainer = trainer_for(build("llama-tied").eval(), tmp_path)
        attach_teacher(trainer, cpu_offload(build("llama-tied", seed=1)), **options)
        assert trainer.compute_loss(trainer.model, dict(batch)).item() > 0

    trainer = trainer_for(build("llama-tied"), tmp_path)
    with pytest.raises(StructPruneError, match="`teacher_device`='cpu' cannot be used with a teacher that accelerate"):
        attach_teacher(trainer, cpu_offload(build("llama-tied", seed=1)), teacher_device="cpu")


def test_a_teacher_with_a_device_map_of_one_device_can_be_offloaded(tmp_path):
    """transformers adds no hooks for such a `device_map`."""
    trainer = trainer_for(build("llama-tied"), tmp_path)
    batch = batch_of(labelled_rows(4))
    build("llama-tied", seed=1).save_pretrained(tmp_path / "teacher")
    teacher = AutoModelForCausalLM.from_pretrained(tmp_path / "teacher", device_map={"": "cpu"})
    attach_teacher(trainer, teacher, teacher_device="offload")
    trainer.compute_loss(trainer.model, dict(batch))
    assert is_offloaded(teacher)


@pytest.mark.parametrize(("options", "message"), [
    ({"temperature": 0.0}, "`temperature` must be a number above 0, got 0.0"),
    ({"temperature": float("inf")}, "`temperature` must be a number above 0, got inf"),
    ({"temperature": "2"}, "`temperature` must be a number above 0, got '2'"),
    ({"task_weight": 1.5}, "`task_weight` must be a number from 0 to 1, got 1.5"),
    ({"teacher_device": "cuda:99"}, "`teacher_device`='cuda:99' does not exist. The number of GPUs is"),
    ({"teacher_dtype": "int8"}, "`teacher_dtype` must be a floating-point dtype, such as \"bfloat16\", got 'int8'"),
    ({"teacher_device": "moon"}, "`teacher_device` must be a device such as 'cuda:1'"),
])  # fmt: skip
def test_arguments_out_of_range_are_refused(options, message, tmp_path):
    trainer = trainer_for(build("llama-tied"), tmp_path)
    with pytest.raises(StructPruneError, match=message):
        attach_teacher(trainer, build("llama-tied", seed=1), **options)


def test_unusable_teachers_are_refused(tmp_path):
    model = build("llama-tied")
    trainer = trainer_for(model, tmp_path)
    pickled = tmp_path / "pickled"
    model.config.save_pretrained(pickled)
    torch.save({"model.norm.weight": Path(".")}, pickled / "pytorch_model.bin")

    for teacher, message in (
        (pickled, "holds Python objects .* Pass a safetensors file"),
        (model, "the same model"),
        (build("llama-tied"), "the same model"),
        (nn.Linear(2, 2), "must be a causal language model"),
        ("no/such/model", "cannot be loaded"),
    ):
        with pytest.raises(StructPruneError, match=message):
            attach_teacher(trainer, teacher)


def test_trainers_that_cannot_have_a_teacher_are_refused(tmp_path):
    teacher = build("llama-tied", seed=1)
    model = build("llama-tied")
    trainer = trainer_for(model, tmp_path)
    attach_teacher(trainer, teacher)
    with pytest.raises(StructPruneError, match="has a teacher already"):
        attach_teacher(trainer, teacher)

    trainer = trainer_for(model, tmp_path)
    trainer.args._n_gpu = 2
    with pytest.raises(StructPruneError, match="nn.DataParallel.*accelerate launch"):
        attach_teacher(trainer, teacher)

    trainer = trainer_for(model, tmp_path)
    trainer.compute_loss_func = print
    with pytest.raises(StructPruneError, match="compute_loss_func"):
        attach_teacher(trainer, teacher)

    trainer = trainer_for(model, tmp_path, label_smoothing_factor=0.1)
    with pytest.raises(StructPruneError, match="label_smoothing_factor=0.1.* Set it to 0"):
        attach_teacher(trainer, teacher)

    prompts = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    prompted = get_peft_model(build("llama-tied"), prompts)
    with pytest.raises(StructPruneError, match="adapter of type PROMPT_TUNING.* such as LoRA"):
        attach_teacher(trainer_for(prompted, tmp_path), teacher)

    with pytest.raises(StructPruneError, match="cannot compare a BertForMaskedLM with a LlamaForCausalLM"):
        attach_teacher(trainer_for(build("bert"), tmp_path), teacher)


class PenaltyTrainer(Trainer):
    def compute_loss(self, model, inputs, *args, **kwargs):
        return super().compute_loss(model, inputs, *args, **kwargs) + 1


class GeneratingTrainer(Trainer):
    def training_step(self, model, inputs, *args, **kwargs):
        return model.generate(inputs["input_ids"]).float().mean()


class TimedTrainer(Trainer):
    def training_step(self, *args, **kwargs):
        return super().training_step(*args, **kwargs)


def test_trainers_with_another_objective_are_refused(tmp_path):
    teacher = build("llama-tied", seed=1)
    for trainer_class in (PenaltyTrainer, GeneratingTrainer):
        trainer = trainer_for(build("llama-tied"), tmp_path, trainer_class=trainer_class)
        with pytest.raises(StructPruneError, match=f"{trainer_class.__name__} has an objective of its own"):
            attach_teacher(trainer, teacher)

    trainer = trainer_for(build("llama-tied"), tmp_path)
    trainer.compute_loss = PenaltyTrainer.compute_loss.__get__(trainer)
    with pytest.raises(StructPruneError, match="Trainer has an objective of its own"):
        attach_teacher(trainer, teacher)

    attach_teacher(trainer_for(build("llama-tied"), tmp_path, trainer_class=TimedTrainer), teacher)


def test_a_seq2seq_trainer_trains_a_decoder(tmp_path):
    model = build("llama-tied")
    classes = {"trainer_class": Seq2SeqTrainer, "arguments_class": Seq2SeqTrainingArguments}
    trainer = trainer_for(model, tmp_path, **classes)
    attach_teacher(trainer, build("llama-tied", seed=1))
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert logs[-1]["kl"] < logs[0]["kl"]


@pytest.mark.parametrize("name", ["input_ids", "labels"])
def test_batches_without_tokens_or_labels_change_no_weight(name, tmp_path):
    def collator_without_name(rows):
        batch = default_data_collator(rows)
        del batch[name]
        return batch

    model = build("llama-tied")
    trainer = trainer_for(model, tmp_path)
    trainer.data_collator = collator_without_name
    attach_teacher(trainer, build("llama-tied", seed=1))
    with pytest.raises(StructPruneError, match=f"batches of the Trainer have no `{name}`.* Pass a `data_collator`"):
        trainer.train()
    assert same_weights(model, build("llama-tied"))


@pytest.mark.parametrize("method", ["get_cp_size", "get_sp_size"])
def test_divided_sequences_are_refused(method, tmp_path, monkeypatch):
    trainer = trainer_for(build("llama-tied"), tmp_path)
    monkeypatch.setattr(trainer, method, lambda: 2)
    with pytest.raises(StructPruneError, match="a teacher needs whole sequences.* Set `cp_size` and `sp_size`"):
        attach_teacher(trainer, build("llama-tied", seed=1))


# --- several processes
# accelerate allows FSDP and tensor parallelism only where processes have GPUs, and PyTorch's work on CPUs too.
PRETEND_GPUS = """
import os

import accelerate.state as state

os.environ["ACCELERATE_BYPASS_DEVICE_MAP"] = "true"  # DDP on CPUs takes no devices
original_init = state.PartialState.__init__

def init_as_gpu(self, *args, **kwargs):
    original_init(self, *args, **kwargs)
    if self._shared_state.get("distributed_type") == state.DistributedType.MULTI_CPU:
        self._shared_state["distributed_type"] = state.DistributedType.MULTI_GPU

state.PartialState.__init__ = init_as_gpu
"""

SCRIPT = (
    PRETEND_GPUS
    + """
import json, os, sys
import torch

torch.set_num_threads(1)
launch, case, lora, source, folder = sys.argv[1:6]
if launch == "fsdp2":
    os.environ.update(
        ACCELERATE_USE_FSDP="true", FSDP_VERSION="2", FSDP_AUTO_WRAP_POLICY="TRANSFORMER_BASED_WRAP",
        FSDP_TRANSFORMER_CLS_TO_WRAP="LlamaDecoderLayer", FSDP_RESHARD_AFTER_FORWARD="true",
        FSDP_STATE_DICT_TYPE="FULL_STATE_DICT",
    )

from models import build
from peft import get_peft_model
from distillation.test_attach import LORA, labelled_rows, trainer_for
from safetensors.torch import save_file
from optimum_structprune import attach_teacher

torch.manual_seed(0)
model = build(case)
if lora == "True":
    model = get_peft_model(model, LORA)
processes = int(os.environ.get("WORLD_SIZE", 1))
trainer = trainer_for(
    model, folder, labelled_rows(64), per_device_train_batch_size=4 // processes, gradient_accumulation_steps=2
)
teacher = build(case, seed=1) if source == "memory" else source
attach_teacher(trainer, teacher, task_weight=0.1)
trainer.train()

metrics = trainer.evaluate()
weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
if trainer.accelerator.is_main_process:
    logs = [[log["loss"], log["kl"]] for log in trainer.state.log_history if "loss" in log]
    logs.append([metrics["eval_loss"], metrics["eval_kl"]])
    with open(f"{folder}/logs.json", "w") as file:
        json.dump({"logs": logs, "type": str(trainer.accelerator.distributed_type)}, file)
    weights = {name.removeprefix("module."): weight.clone().contiguous() for name, weight in weights.items()}
    save_file(weights, f"{folder}/weights")
"""
)


def read_results(folder):
    """Return the logs and the weights that the script saved."""
    return json.loads((folder / "logs.json").read_text()), load_file(folder / "weights")


def train_in_processes(run, folder, launch, *arguments):
    folder.mkdir()
    run(SCRIPT, folder, launch, *arguments, folder)
    return read_results(folder)


def assert_two_processes_train_like_one(folder, launch, *arguments):
    expected, expected_weights = train_in_processes(on_one_rank, folder / "one", "one", *arguments)
    results, weights = train_in_processes(on_two_ranks, folder / "two", launch, *arguments)

    kinds = {"ddp": "MULTI", "fsdp2": "FSDP"}
    assert kinds[launch] in results["type"]
    torch.testing.assert_close(torch.tensor(results["logs"]), torch.tensor(expected["logs"]), atol=1e-5, rtol=0)

    assert weights.keys() == expected_weights.keys()
    for name, weight in expected_weights.items():
        torch.testing.assert_close(weights[name], weight, atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize(("launch", "case", "lora"), [
    ("ddp", "llama-tied", False),
    ("fsdp2", "llama-untied", True),
    pytest.param("ddp", "llama-untied", True, marks=pytest.mark.nightly),
    pytest.param("fsdp2", "llama-tied", False, marks=pytest.mark.nightly),
])  # fmt: skip
def test_two_processes_train_like_one(launch, case, lora, tmp_path):
    assert_two_processes_train_like_one(tmp_path, launch, case, lora, "memory")


@pytest.mark.slow
@pytest.mark.parametrize("launch", [pytest.param("ddp", marks=pytest.mark.nightly), "fsdp2"])
def test_two_processes_with_a_teacher_file_train_like_one(launch, tmp_path):
    write_teacher(build("llama-untied", seed=1), labelled_rows(64), tmp_path / "file")
    assert_two_processes_train_like_one(tmp_path, launch, "llama-untied", False, tmp_path / "file")


EVALUATION = """
import sys
import torch

torch.set_num_threads(1)
kind, folder = sys.argv[1:]

from datasets import Dataset
from models import build, documents, tokenizer
from distillation.test_attach import labelled_rows, trainer_for
from optimum_structprune import attach_teacher

if kind == "rows":
    trainer = trainer_for(build("llama-tied"), folder, labelled_rows(16), per_device_eval_batch_size=2)
    rows = labelled_rows(11)
else:
    from trl import SFTConfig, SFTTrainer

    texts = []
    for number, text in enumerate(documents(11)):
        texts.append(text[: 20 + 5 * number])
    rows = Dataset.from_dict({"text": texts})
    settings = {"use_cpu": True, "bf16": False, "report_to": []}
    arguments = SFTConfig(folder, padding_free=True, max_length=None, per_device_eval_batch_size=2, **settings)
    trainer = SFTTrainer(
        build("llama-tied"), args=arguments, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer()
    )
    rows = trainer.eval_dataset

attach_teacher(trainer, build("llama-tied", seed=1))
metrics = trainer.evaluate(rows)
print(f"kl={metrics['eval_kl']}")
"""


def printed_divergences(output):
    return [float(value) for value in re.findall(r"kl=([\d.]+)", output)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", [pytest.param("rows", marks=pytest.mark.nightly), "padding-free"])
def test_samples_that_fill_the_last_batch_are_not_counted(kind, tmp_path):
    """Two processes with batches of two evaluate eleven samples, and repeat one."""
    (expected,) = printed_divergences(on_one_rank(EVALUATION, tmp_path, kind, tmp_path))
    results = printed_divergences(on_two_ranks(EVALUATION, tmp_path, kind, tmp_path).stdout)
    assert results == pytest.approx([expected, expected], abs=2e-6)


TENSOR_PARALLEL = (
    PRETEND_GPUS
    + """
import os, sys
import torch

torch.set_num_threads(1)
folder, teacher = sys.argv[1:]

from accelerate import ParallelismConfig
from distillation.test_attach import labelled_rows, trainer_for
from transformers import AutoModelForCausalLM
from optimum_structprune import attach_teacher

settings = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0}
options = {}
if int(os.environ.get("WORLD_SIZE", 1)) > 1:
    torch.distributed.init_process_group("gloo")
    settings["parallelism_config"] = ParallelismConfig(tp_size=2)
    options["tp_plan"] = "auto"

model = AutoModelForCausalLM.from_pretrained(folder, **options)
trainer = trainer_for(model, folder, labelled_rows(), **settings)
attach_teacher(trainer, teacher)
trainer.train()
for log in trainer.state.log_history:
    if "loss" in log:
        print(f"loss={log['loss']} kl={log['kl']}")
"""
)


@pytest.mark.slow
def test_tensor_parallel_processes_train_like_one(tmp_path):
    build("llama-untied").save_pretrained(tmp_path)
    build("llama-untied", seed=1).save_pretrained(tmp_path / "teacher")
    expected_output = on_one_rank(TENSOR_PARALLEL, tmp_path, tmp_path, tmp_path / "teacher")
    output = on_two_ranks(TENSOR_PARALLEL, tmp_path, tmp_path, tmp_path / "teacher").stdout

    expected = [float(value) for value in re.findall(r"(?:loss|kl)=([\d.]+)", expected_output)]
    values = [float(value) for value in re.findall(r"(?:loss|kl)=([\d.]+)", output)]
    assert len(expected) == 8
    assert values == pytest.approx(expected * 2, abs=2e-6)


# FSDP's RAM-efficient loading may leave zeros in all processes but the first.
RAM_EFFICIENT = """
import torch

torch.distributed.init_process_group("gloo")

from models import build
from optimum_structprune import StructPruneError
from optimum_structprune.distillation.teacher import load_teacher

def load(seed):
    model = build("llama-tied", seed=seed)
    if torch.distributed.get_rank() > 0:
        for weight in model.parameters():
            weight.data.zero_()
    return model

load_teacher(load(seed=1), load(seed=0))
try:
    load_teacher(load(seed=0), load(seed=0))
except StructPruneError as error:
    print(error)
"""


@pytest.mark.slow
def test_the_first_process_compares_the_weights_of_teacher_and_student(tmp_path):
    output = on_two_ranks(RAM_EFFICIENT, tmp_path).stdout
    assert output.count("are the same model") == 2
