"""How a pruned model is trained afterwards: one strict, serialisable dataclass."""

# No `from __future__ import annotations` here: `strict` checks types only where it sees them, not their names.
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from huggingface_hub.dataclasses import strict, validated_field

from .domains import DomainConfig, WithDomains
from .fields import Number, config_class, filled, positive, proportion, seed_of_all


LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
TRAINING = {
    "num_train_epochs": 1,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.05,
    "logging_steps": 10,
    "train_sampling_strategy": "sequential",
    "report_to": "none",
}

LEARNING_RATES = {"lora": 1e-3, "full": 1e-4}


@config_class
@strict
@dataclass(kw_only=True)
class RecoveryConfig(WithDomains):
    """Holds the settings of a training after pruning, with or without a teacher.

    Fields that are None follow the pruning config where there is one, and its defaults otherwise.

    Args:
        tokens: The number of tokens to train on in all; those of prompts do not count. The domains give text by their
            weights.
        seq_length: The number of tokens in a training sample, of which those of prompts do not count. By default it is
            that of the pruning, or 128 if that is less.
        domains: The training text, without the documents that the perplexity is measured on. None stands for the
            domains of the pruning, without what the model wrote beside them.
        train: What is trained: `lora` trains a low-rank adapter, `full` all weights.
        lora: Fields of `peft.LoraConfig`, laid over `LORA`.
        training: Fields of `transformers.TrainingArguments`, laid over `TRAINING` and `LEARNING_RATES`.
            With an `output_dir`, checkpoints go there and training can be resumed.
        answer_share: The share of the tokens that are answers to prompts; the others are text. Without a teacher all
            are text.
        prompts: A file of prompts: JSON lines with `messages` or a `prompt`, else a question in each line. By default
            they are built in, and for a model without a chat template, they are openings of the text.
        validation: The source of the validation text, of a kind that is not trained on, by which checkpoints are
            compared. By default it is built-in text of other kinds.
        seed: The seed of the adapter's values and of the order of the samples. Which documents are read, and which of
            them are held out, follows the seed of the pruning.

    Raises:
        StructPruneError: If a field is unknown, or a value has another type, lies outside of its range, or contradicts
            another one. The message names the field and the value.
    """

    gone = {"kl_weight": 1.0, "merge": True, "left_out": None}

    tokens: int = validated_field(positive, default=200_000)
    seq_length: int | None = validated_field(positive, default=None)
    domains: list[DomainConfig] | None = None
    train: Literal["lora", "full"] = "lora"
    lora: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    answer_share: Number = validated_field(proportion, default=0.5)
    prompts: str | None = validated_field(filled, default=None)
    validation: str | None = validated_field(filled, default=None)
    seed: int | None = validated_field(seed_of_all, default=None)

    def without_output_dir(self) -> "RecoveryConfig":
        """The config for who trains again: where its checkpoints lay is of no use to them."""
        return replace(self, training={name: value for name, value in self.training.items() if name != "output_dir"})

    def validate_train(self) -> None:
        """Refuse what belongs to another way of training."""
        if self.lora and self.train != "lora":
            raise ValueError(f"lora={self.lora} belongs to train='lora', got train={self.train!r}; leave out either")
