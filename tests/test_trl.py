"""Pruning inside the trainers of TRL, which replace the `forward` of a model."""

import pytest
import torch
from datasets import Dataset
from helpers import logits
from models import build, config, documents, tokenizer
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from optimum_structprune import attach_pruner


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
    trainer = DPOTrainer(
        build("llama-tied"),
        ref_model=build("llama-tied"),
        args=DPOConfig(str(tmp_path), **SHORT),
        train_dataset=preferences(),
        processing_class=tokenizer(),
    )
    prune_while_training(trainer, tmp_path / "out")
