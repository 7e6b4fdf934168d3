"""The config of the training after a pruning."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ..system.errors import StructPruneError
from .domains import DomainConfig, check_domains
from .fields import Config


LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
TRAINING = {
    "num_train_epochs": 1,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.05,
    "report_to": "none",
}

# The ways to initialize an adapter that do not change the model. PiSSA and OLoRA change weights, and False outputs.
LORA_INITS = (True, "gaussian")
LEARNING_RATES = {"lora": 1e-3, "full": 1e-4}


@dataclass(kw_only=True)
class RecoveryConfig(Config):
    """Settings of a training after pruning, with or without a teacher.

    Fields that are None default to the pruning config, or to its defaults without one.

    Args:
        tokens: The total number of training tokens, including prompts and answers. The domains share them by weight.
        seq_length: The number of tokens in a training sample. By default 512 on a CPU and 1,024 on a GPU; less if the
            model has fewer positions, or, down to 128, if the training would have fewer than 100 samples.
        domains: The training text, without the documents that the perplexity is measured on. The default is the
            domains of the pruning, without general text that the model wrote for it.
        train: The weights to train: `lora` trains a low-rank adapter, `full` all weights. The default is `lora` for
            causal language models. Encoders train all weights but the token embeddings.
        lora: Fields of `peft.LoraConfig`, which override `LORA`.
        training: Fields of `transformers.TrainingArguments`, which override `TRAINING` and `LEARNING_RATES`.
            With an `output_dir`, checkpoints are saved there, and training can be resumed.
        answer_share: The fraction of the tokens that is answers to prompts. The others are text. Without a teacher,
            all tokens are text.
        prompts: A file of prompts: JSON lines with `messages` or a `prompt`, else a question in each line. The default
            is built-in prompts, or openings of the text for a model without a chat template.
        validation: The source of the validation text, which compares checkpoints. It should be text of a kind
            that is not trained on. The default is built-in text of other kinds.
        pairs: For encoders: a file with a question and its passage, or a text and its translation, in each line of
            JSON. Most pairs are trained on, and some measure the retrieval.
        seed: The seed of the adapter's values and of the order of the samples. The seed of the pruning determines
            the documents that are read and held out.

    Raises:
        StructPruneError: If a field is unknown, or a value has another type, is out of range, or contradicts another
            value. The message names the field and the value.
    """

    tokens: int = 200_000
    seq_length: int | None = None
    domains: list[DomainConfig] | None = None
    train: Literal["lora", "full"] | None = None
    lora: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    answer_share: float = 0.5
    prompts: str | None = None
    validation: str | None = None
    pairs: str | None = None
    seed: int | None = None

    def validate(self) -> None:
        """Raise `StructPruneError` if a value or a combination of values is not legal."""
        super().validate()

        self.check_count("tokens", "seq_length")
        self.check_share("answer_share", allow_zero=True, allow_one=True)
        self.check_seed("seed")
        self.check_not_empty("prompts", "validation", "pairs")
        check_domains(self)
        if self.lora and self.train == "full":
            raise StructPruneError(
                f"lora={self.lora} needs train='lora', got train={self.train!r}. Remove one of the two."
            )
        if "resume_from_checkpoint" in self.training:
            raise StructPruneError(
                "`training` must not have `resume_from_checkpoint`. Set `output_dir` there, and resume with "
                "`resume=True` or `--resume`."
            )
        init = self.lora.get("init_lora_weights", True)
        if init not in LORA_INITS:
            legal = " or ".join(map(repr, LORA_INITS))
            raise StructPruneError(
                f"`lora` has init_lora_weights={init!r}. Choose {legal}. Other values change the model, and an "
                "interrupted training could not restore it."
            )

    def without_output_dir(self) -> RecoveryConfig:
        """Return a copy without the `output_dir`, which exists only on this machine."""
        training = dict(self.training)
        training.pop("output_dir", None)
        return replace(self, training=training)
