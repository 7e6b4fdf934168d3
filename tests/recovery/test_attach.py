"""A Trainer with a teacher minimises the KL divergence from it, on one process and on several."""

import json
import os
import sys

import pytest
import torch
from accelerate import cpu_offload
from datasets import Dataset, IterableDataset
from helpers import on_two_ranks, ran, same_weights
from models import build, documents, token_ids, tokenizer
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from torch.nn.functional import cross_entropy, kl_div
from transformers import (
    AutoModelForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

from optimum_structprune import StructPruneError, attach_teacher
from optimum_structprune.arch.meta import is_offloaded
from optimum_structprune.recovery.teacher import load_teacher


LORA = LoraConfig(r=2, target_modules="all-linear")


def labelled_rows(count=16, length=16):
    """Samples whose first tokens do not count, a different number in each."""
    rows = []
    for number, ids in enumerate(token_ids(count, length).tolist()):
        ignored = number % 5
        rows.append({"input_ids": ids, "labels": [-100] * ignored + ids[ignored:]})
    return rows


def trainer_for(model, folder, rows=None, **settings):
    defaults = {
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
    arguments = TrainingArguments(str(folder), **{**defaults, **settings})
    rows = rows or labelled_rows()
    return Trainer(
        model=model, args=arguments, train_dataset=rows, eval_dataset=rows[:8], data_collator=default_data_collator
    )


def batch_of(rows):
    return {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}


def plain_loss(student, teacher, batch, temperature, task_weight):
    """The loss by its formula, from all logits at once."""
    counted = batch["labels"][:, 1:] != -100
    ours = student(batch["input_ids"]).logits[:, :-1][counted].float()
    with torch.no_grad():
        theirs = teacher(batch["input_ids"]).logits[:, :-1][counted].float()
    log_student = (ours / temperature).log_softmax(-1)
    log_teacher = (theirs / temperature).log_softmax(-1)
    kl = kl_div(log_student, log_teacher, log_target=True, reduction="batchmean")
    task = cross_entropy(ours, batch["labels"][:, 1:][counted])
    return (1 - task_weight) * temperature**2 * kl + task_weight * task


def gradients(model):
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


# Plain heads tied and untied, and heads whose output is capped or scaled.
@pytest.mark.parametrize("case", ["llama-tied", "llama-untied", "gemma2", "granite", "cohere"])
@pytest.mark.parametrize("lora", [False, True])
def test_loss_and_gradients_are_those_of_the_formula(case, lora, tmp_path, monkeypatch):
    monkeypatch.setattr("optimum_structprune.recovery.chunked_loss.MIN_CHUNK_TOKENS", 7)
    monkeypatch.setattr("optimum_structprune.recovery.chunked_loss.CHUNK_BYTES", {"cpu": 1})
    student = build(case)
    teacher = build(case, seed=1)
    if lora:
        student = get_peft_model(student, LORA)
    trainer = trainer_for(student, tmp_path)
    attach_teacher(trainer, teacher, temperature=2.0, task_weight=0.25)
    batch = batch_of(labelled_rows(4))
    student.train()
    for _ in range(2):  # the first batch finds out whether the head is plain
        student.zero_grad()
        loss = trainer.compute_loss(student, dict(batch))
        loss.backward()
    found = gradients(student)

    student.zero_grad()
    expected = plain_loss(student, teacher, batch, 2.0, 0.25)
    expected.backward()
    torch.testing.assert_close(loss, expected)
    assert found.keys() == gradients(student).keys() and found
    for name, gradient in gradients(student).items():
        torch.testing.assert_close(found[name], gradient, msg=name)


def test_a_teacher_that_is_loaded_computes_attention_as_the_model_does(tmp_path):
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
    before = build("llama-tied")
    for name, weight in models[0].named_parameters():
        torch.testing.assert_close(weight, models[1].get_parameter(name), atol=1e-6, rtol=1e-5)
    assert not same_weights(models[0], before)


def test_logs_and_evaluations_have_the_divergence(tmp_path):
    model = build("llama-tied")
    trainer = trainer_for(model, tmp_path, max_steps=12)
    attach_teacher(trainer, build("llama-tied", seed=1), task_weight=0.05)
    before = trainer.evaluate()
    trainer.train()
    logged = [log["kl"] for log in trainer.state.log_history if "loss" in log]
    after = trainer.evaluate()
    assert len(logged) == 12 and logged[-1] < logged[0]
    assert after["eval_kl"] < before["eval_kl"]
    # The divergence is logged alone, and the loss has the cross-entropy too.
    assert after["eval_loss"] > after["eval_kl"]


def test_an_evaluation_counts_no_loss_that_was_computed_before(tmp_path):
    model = build("llama-tied")
    trainer = trainer_for(model, tmp_path)
    attach_teacher(trainer, build("llama-tied", seed=1))
    alone = trainer.evaluate()["eval_kl"]

    # A trial step has other losses in eval mode.
    model.eval()
    batch = batch_of(labelled_rows(length=7)[8:])
    with torch.no_grad():
        assert trainer.compute_loss(model, batch).item() != pytest.approx(alone)
    assert trainer.evaluate()["eval_kl"] == alone


def trains_six_steps(folder, interrupts=None):
    """A Trainer of six steps with a checkpoint after the third."""
    trainer = trainer_for(build("llama-tied"), folder, max_steps=6, save_strategy="steps", save_steps=3)
    attach_teacher(trainer, build("llama-tied", seed=1))
    if interrupts is not None:
        trainer.add_callback(interrupts)
    return trainer


class InterruptAfterFive(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 5:
            raise KeyboardInterrupt


def test_a_resumed_training_ends_with_the_weights_of_an_uninterrupted_one(tmp_path):
    whole = trains_six_steps(tmp_path / "whole")
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        trains_six_steps(tmp_path / "half", InterruptAfterFive()).train()
    resumed = trains_six_steps(tmp_path / "half")
    resumed.train(resume_from_checkpoint=True)
    assert same_weights(resumed.model, whole.model)
    assert not same_weights(resumed.model, build("llama-tied"))


def texts():
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
    streams = settings.get("gradient_accumulation_steps") is None
    dataset = IterableDataset.from_generator(texts) if streams else Dataset.from_list(list(texts()))
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
        eval_dataset=Dataset.from_list(list(texts())[:16]),
        processing_class=tokenizer(),
        peft_config=LORA,
    )
    attach_teacher(trainer, build("llama-tied", seed=1))
    before = trainer.evaluate()["eval_kl"]
    trainer.train()
    assert trainer.evaluate()["eval_kl"] < before
    assert all("kl" in log for log in trainer.state.log_history if "loss" in log)


def test_a_teacher_in_bfloat16_or_offloaded_predicts_nearly_the_same(tmp_path):
    batch = batch_of(labelled_rows(4))
    losses = []
    for options in ({}, {"teacher_dtype": torch.bfloat16}, {"teacher_device": "offload"}):
        model = build("llama-tied").eval()
        trainer = trainer_for(model, tmp_path)
        attach_teacher(trainer, build("llama-tied", seed=1), **options)
        losses.append(trainer.compute_loss(model, dict(batch)).item())
    assert losses[1] == pytest.approx(losses[0], rel=0.02) and losses[1] != losses[0]
    assert losses[2] == losses[0]


def test_a_teacher_that_accelerate_has_placed_stays_in_its_place(tmp_path):
    """accelerate moves the inputs of each module to its first device, wherever the weights are by then."""
    batch = batch_of(labelled_rows(4))
    for options in ({}, {"teacher_device": "offload"}):
        trainer = trainer_for(build("llama-tied").eval(), tmp_path)
        attach_teacher(trainer, cpu_offload(build("llama-tied", seed=1)), **options)
        assert trainer.compute_loss(trainer.model, dict(batch)).item() > 0
    trainer = trainer_for(build("llama-tied"), tmp_path)
    with pytest.raises(StructPruneError, match="`teacher_device`='cpu' cannot be used with a teacher that accelerate"):
        attach_teacher(trainer, cpu_offload(build("llama-tied", seed=1)), teacher_device="cpu")

    # A `device_map` of one device puts no hooks into the model.
    build("llama-tied", seed=1).save_pretrained(tmp_path / "teacher")
    teacher = AutoModelForCausalLM.from_pretrained(tmp_path / "teacher", device_map={"": "cpu"})
    attach_teacher(trainer, teacher, teacher_device="offload")
    trainer.compute_loss(trainer.model, dict(batch))
    assert is_offloaded(teacher)


@pytest.mark.parametrize(("options", "message"), [
    ({"temperature": 0.0}, "`temperature` must be above 0, got 0.0"),
    ({"task_weight": 1.5}, "`task_weight` must be between 0 and 1, got 1.5"),
    ({"teacher_device": "moon"}, "`teacher_device` must be a device such as 'cuda:1'"),
])  # fmt: skip
def test_arguments_out_of_range_are_refused(options, message, tmp_path):
    trainer = trainer_for(build("llama-tied"), tmp_path)
    with pytest.raises(StructPruneError, match=message):
        attach_teacher(trainer, build("llama-tied", seed=1), **options)


def test_trainers_that_cannot_have_a_teacher_are_refused(tmp_path):
    teacher = build("llama-tied", seed=1)
    model = build("llama-tied")
    trainer = trainer_for(model, tmp_path)
    for refused, message in (
        (model, "the same model"),
        (build("llama-tied"), "the same model"),
        (nn.Linear(2, 2), "must be a causal language model"),
        ("no/such/model", "cannot be loaded"),
    ):
        with pytest.raises(StructPruneError, match=message):
            attach_teacher(trainer, refused)
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
    with pytest.raises(StructPruneError, match="causal language models, and BertFor"):
        attach_teacher(trainer_for(build("bert"), tmp_path), teacher)


# --- several processes
SCRIPT = """
import json, os, sys
import torch

torch.set_num_threads(1)
way, case, lora, folder = sys.argv[1:5]
if way == "fsdp2":
    # accelerate allows FSDP only where processes have GPUs, and PyTorch's `fully_shard` also works on CPUs.
    import accelerate.state as state

    start = state.PartialState.__init__

    def started(self, *arguments, **options):
        start(self, *arguments, **options)
        if self._shared_state.get("distributed_type") == state.DistributedType.MULTI_CPU:
            self._shared_state["distributed_type"] = state.DistributedType.MULTI_GPU

    state.PartialState.__init__ = started
    os.environ.update(
        ACCELERATE_USE_FSDP="true", FSDP_VERSION="2", FSDP_AUTO_WRAP_POLICY="TRANSFORMER_BASED_WRAP",
        FSDP_TRANSFORMER_CLS_TO_WRAP="LlamaDecoderLayer", FSDP_RESHARD_AFTER_FORWARD="true",
        FSDP_STATE_DICT_TYPE="FULL_STATE_DICT",
    )

from models import build
from peft import get_peft_model
from recovery.test_attach import LORA, labelled_rows, trainer_for
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
attach_teacher(trainer, build(case, seed=1), task_weight=0.1)
trainer.train()
measured = trainer.evaluate()
weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
if trainer.accelerator.is_main_process:
    logs = [[log["loss"], log["kl"]] for log in trainer.state.log_history if "loss" in log]
    logs.append([measured["eval_loss"], measured["eval_kl"]])
    with open(f"{folder}/logs.json", "w") as file:
        json.dump({"logs": logs, "type": str(trainer.accelerator.distributed_type)}, file)
    save_file({name.removeprefix("module."): w.clone().contiguous() for name, w in weights.items()}, f"{folder}/w")
"""


@pytest.mark.slow
@pytest.mark.parametrize(("case", "lora"), [("llama-tied", False), ("llama-untied", True)])
@pytest.mark.parametrize("way", ["ddp", "fsdp2"])
def test_two_processes_train_like_one(way, case, lora, tmp_path):
    results = []
    for name in ("one", way):
        folder = tmp_path / name
        folder.mkdir()
        if name == "one":
            (folder / "script.py").write_text(SCRIPT)
            tests = os.path.dirname(os.path.dirname(__file__))
            path = os.pathsep.join(filter(None, [tests, os.environ.get("PYTHONPATH")]))
            ran(
                [sys.executable, folder / "script.py", name, case, lora, folder],
                env={**os.environ, "PYTHONPATH": path},
            )
        else:
            on_two_ranks(SCRIPT, folder, name, case, lora, folder)
        results.append((json.loads((folder / "logs.json").read_text()), load_file(folder / "w")))
    (one, one_weights), (two, two_weights) = results
    assert ("FSDP" if way == "fsdp2" else "MULTI") in two["type"]
    torch.testing.assert_close(torch.tensor(two["logs"]), torch.tensor(one["logs"]), atol=1e-5, rtol=0)
    assert one_weights.keys() == two_weights.keys()
    for name, weight in one_weights.items():
        torch.testing.assert_close(two_weights[name], weight, atol=1e-5, rtol=0)
