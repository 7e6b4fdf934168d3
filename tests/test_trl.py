"""Pruning inside the trainers of TRL, which replace the `forward` of a model, and trainers that have no teacher."""

import pytest
import torch
from datasets import Dataset
from helpers import logits
from models import build, config, documents, tokenizer
from transformers import AutoModelForCausalLM
from trl import (
    DistillationConfig,
    DistillationTrainer,
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    SFTConfig,
    SFTTrainer,
)
from trl.experimental.gkd import GKDConfig, GKDTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from optimum_structprune import StructPruneError, attach_pruner, attach_teacher


pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::FutureWarning")]

# The generation block tells TRL which tokens the assistant wrote.
TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}{{ '\\n' }}{% endfor %}"
)
QUIET = {"report_to": "none", "save_strategy": "no", "use_cpu": True, "bf16": False, "disable_tqdm": True}
SHORT = {"max_steps": 4, "per_device_train_batch_size": 2, "max_length": 32, **QUIET}


def texts() -> Dataset:
    return Dataset.from_dict({"text": documents(40)})


def conversations() -> Dataset:
    rows = []
    for question, answer in zip(documents(40), documents(40, seed=1), strict=True):
        rows.append([{"role": "user", "content": question}, {"role": "assistant", "content": answer}])
    return Dataset.from_dict({"messages": rows})


def preferences() -> Dataset:
    chosen = [f" {text}" for text in documents(24, seed=1)]
    rejected = [f" {text}" for text in documents(24, seed=2)]
    return Dataset.from_dict({"prompt": documents(24), "chosen": chosen, "rejected": rejected})


def dpo(folder):
    return DPOTrainer(
        build("llama-tied"),
        ref_model=build("llama-tied"),
        args=DPOConfig(folder, **SHORT),
        train_dataset=preferences(),
        processing_class=tokenizer(),
    )


def prune_while_training(trainer, folder) -> None:
    """Train with a pruner, and check the widths and the saved model."""
    attach_pruner(trainer, config(widths={"mlp": 24}, num_samples=2), start=2)
    trainer.train()
    assert trainer.state.global_step == 4
    assert trainer.model.config.intermediate_size == 24

    trainer.save_model(folder)
    saved = AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(logits(saved), logits(trainer.model.eval()))


@pytest.mark.parametrize("fields", [
    {},
    {"packing": True},
    {"loss_type": "nll"},
], ids=str)  # fmt: skip
def test_sft_on_texts(tmp_path, fields):
    arguments = SFTConfig(str(tmp_path), **SHORT, **fields)
    trainer = SFTTrainer(build("llama-tied"), args=arguments, train_dataset=texts(), processing_class=tokenizer())
    prune_while_training(trainer, tmp_path / "out")


def test_sft_on_answers_of_the_assistant(tmp_path):
    arguments = SFTConfig(str(tmp_path), assistant_only_loss=True, **SHORT)
    reader = tokenizer()
    reader.chat_template = TEMPLATE
    trainer = SFTTrainer(build("llama-untied"), args=arguments, train_dataset=conversations(), processing_class=reader)
    prune_while_training(trainer, tmp_path / "out")


def test_dpo(tmp_path):
    prune_while_training(dpo(str(tmp_path)), tmp_path / "out")


def chat_tokenizer():
    reader = tokenizer()
    reader.chat_template = TEMPLATE
    return reader


def kto(folder):
    rows = preferences().rename_column("chosen", "completion").remove_columns("rejected")
    rows = rows.add_column("label", [True, False] * 12)
    return KTOTrainer(
        build("llama-tied"),
        ref_model=build("llama-tied"),
        args=KTOConfig(folder, **SHORT),
        train_dataset=rows,
        processing_class=tokenizer(),
    )


def orpo(folder):
    config = ORPOConfig(folder, **SHORT)
    model = build("llama-tied")
    return ORPOTrainer(model, args=config, train_dataset=preferences(), processing_class=tokenizer())


def grpo(folder):
    def reward(completions, **columns):
        return [float(len(completion)) for completion in completions]

    config = GRPOConfig(folder, num_generations=2, per_device_train_batch_size=2, **QUIET)
    rows = preferences().select_columns("prompt")
    return GRPOTrainer(build("llama-tied"), reward, args=config, train_dataset=rows, processing_class=chat_tokenizer())


def gkd(folder):
    return GKDTrainer(
        build("llama-tied"),
        teacher_model=build("llama-tied", seed=2),
        args=GKDConfig(folder, **SHORT),
        train_dataset=conversations(),
        processing_class=chat_tokenizer(),
    )


def distillation(folder):
    return DistillationTrainer(
        build("llama-tied"),
        teacher_model=build("llama-tied", seed=2),
        args=DistillationConfig(folder, **QUIET),
        train_dataset=preferences().select_columns("prompt"),
        processing_class=chat_tokenizer(),
    )


@pytest.mark.parametrize("make_trainer", [dpo, kto, orpo, grpo, gkd, distillation])
def test_trainers_with_another_objective_have_no_teacher(make_trainer, tmp_path):
    trainer = make_trainer(str(tmp_path))
    message = f"{type(trainer).__name__} has an objective of its own.*Use a Trainer that minimises the cross-entropy"
    with pytest.raises(StructPruneError, match=message):
        attach_teacher(trainer, build("llama-tied", seed=5))
