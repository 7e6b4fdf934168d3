"""A Trainer whose loss compares the model with a teacher, and which stops at the first loss that is not finite."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from math import ceil, exp, isfinite, isnan, log
from pathlib import Path
from statistics import fmean
from time import perf_counter
from typing import Any, TypeVar, cast, get_type_hints

import torch
from accelerate.utils import broadcast_object_list
from huggingface_hub.dataclasses import type_validator
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import Dataset
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_utils import IntervalStrategy

from ..arch.load import describe
from ..arch.meta import predicts_next
from ..arch.token_space import named_ids
from ..config.fields import build
from ..config.recovery import RATES, TRAINING, RecoveryConfig
from ..domains.readers import ids_in, reader_of
from ..errors import StructPruneError, one_line, warn
from ..forward.metrics import divergence, evaluating, input_device
from ..record.report import RecoveryReport
from ..removals.resize import drop_tokens_
from ..system.disk import is_write_error
from ..system.fingerprint import computing
from .adapter import check_adapter
from .resume import weights_hash


M = TypeVar("M", bound=nn.Module)

# What libraries raise where a value of `config.training` is of no use to them.
LIBRARY_ERRORS = (TypeError, ValueError, AttributeError, KeyError, ImportError, RuntimeError, AssertionError)
ADVICE = "lower training['learning_rate'], or train in float32 or bfloat16."


class NotFiniteError(StructPruneError):
    """The loss is NaN or infinite."""


def training_arguments(config: RecoveryConfig, seed: int, on_cpu: bool, scratch: str) -> TrainingArguments:
    """The arguments of the Trainer: `config.training` laid over the defaults."""
    with _readable("TrainingArguments: "):
        given = _typed(config.training)
        saving: dict[str, Any] = {"save_strategy": "no", "output_dir": scratch}
        if "output_dir" in given:
            saving = {"save_strategy": "steps", "save_steps": 0.1, "save_total_limit": 1}
        # All columns are the model's arguments, whatever the signature of an adapter around it says.
        fixed = {"seed": seed, "use_cpu": on_cpu, "remove_unused_columns": False}
        rate = {"learning_rate": RATES[config.train]}
        arguments = build(TrainingArguments, {**TRAINING, **rate, **saving, **fixed, **given})
    _check_use(arguments)
    return arguments


def _check_use(arguments: TrainingArguments) -> None:
    """Refuse values that `TrainingArguments` accepts and a training does not."""
    for name in ("per_device_train_batch_size", "gradient_accumulation_steps"):
        if getattr(arguments, name) < 1:
            raise StructPruneError(f"TrainingArguments: {name} has to be 1 or more, got {getattr(arguments, name)}.")
    if arguments.learning_rate < 0:
        raise StructPruneError(f"TrainingArguments: learning_rate has to be 0 or more, got {arguments.learning_rate}.")
    if arguments.eval_on_start or arguments.eval_strategy != IntervalStrategy.NO:
        raise StructPruneError(
            "TrainingArguments: eval_strategy and eval_on_start measure on an eval_dataset, and a recovery has none; "
            "leave them out, it measures perplexity on held-out text before and after."
        )
    if arguments.push_to_hub:
        raise StructPruneError(
            "TrainingArguments: push_to_hub would upload what the training writes on its way; leave it out, and push "
            "the result with push_to_hub or --push-to-hub."
        )


def _typed(training: Mapping[str, Any]) -> dict[str, Any]:
    """Values of the types that `TrainingArguments` declares, which it does not check itself."""
    hints = get_type_hints(TrainingArguments)
    typed = dict(training)
    for name, value in training.items():
        if name.endswith("_strategy") and value is False:
            typed[name] = "no"  # what YAML reads `save_strategy: no` as
        elif hints.get(name) is float and type(value) is int:
            typed[name] = float(value)
        elif name != "fsdp":  # declared as text for the sake of an older form, and on or off today
            type_validator(name, value, hints.get(name, Any))
    return typed


@contextmanager
def _readable(saying: str) -> Iterator[None]:
    """Errors of other libraries inside `with` are told as ours, with the cause."""
    try:
        yield
    except StructPruneError:
        raise
    except LIBRARY_ERRORS as error:
        reason = one_line(error)
        raise StructPruneError(f"{saying}{type(error).__name__}: {reason}") from error


class DistillTrainer(Trainer):
    """Trains what is trainable of a model."""

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        arguments: TrainingArguments,
        samples: Dataset,
        recovery: RecoveryConfig,
        teacher: PreTrainedModel | None = None,
    ):
        with _readable("The Trainer cannot be made: "):
            super().__init__(model=model, args=arguments, train_dataset=samples)
        # The loss is a mean over equally long samples, so the Trainer may average over accumulation steps.
        self.model_accepts_loss_kwargs = False
        self.recovery = recovery
        self.teacher = teacher
        # The step and what is trained at its beginning, of the last step with a finite loss.
        self._finite: tuple[int, dict[str, Tensor]] | None = None

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as `Trainer.train` does, with the teacher in eval mode."""
        try:
            with evaluating(*([] if self.teacher is None else [self.teacher])):
                return super().train(*args, **kwargs)
        finally:
            # accelerate leaves a `forward` that computes in mixed precision on the model itself.
            self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)

    def tokens_seen(self) -> int:
        """The number of tokens of text that were trained on, without the samples that the Trainer counts twice where
        they fill up the last batch of several processes.
        """
        epochs = ceil(self.state.epoch or 0)
        samples = cast("Any", self.train_dataset)
        text = len(samples) * len(samples[0]["input_ids"]) * epochs
        return min(int(self.state.num_input_tokens_seen), text)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Cross-entropy, mixed with the divergence from the teacher."""
        outputs = model(**inputs)
        loss = outputs.loss
        if self.teacher is not None:
            with torch.no_grad(), self.accelerator.autocast():
                taught = self.teacher(inputs["input_ids"].to(input_device(self.teacher)), use_cache=False).logits
            weight, temperature = self.recovery.kl_weight, float(self.recovery.temperature)
            apart = divergence(outputs.logits, taught.to(outputs.logits.device), temperature)
            loss = (1 - weight) * loss + weight * apart
        self._check(loss.detach())
        if self._finite is None or self._finite[0] != self.state.global_step:
            weights = {name: tensor.clone() for name, tensor in self._trainable().items()}
            self._finite = self.state.global_step, weights
        return (loss, outputs) if return_outputs else loss

    def check_weights(self) -> None:
        """Refuse weights that the last step has spoilt; no loss is computed after it that would show it."""
        tensors = self._trainable().values()
        shards = (tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors)
        finite = all(shard.isfinite().all() for shard in shards)
        # Of sharded weights every process sees its own part.
        if not self.accelerator.gather(torch.tensor([finite], device=self.accelerator.device)).all():
            raise NotFiniteError(f"The weights after step {self.state.global_step} are not finite; {ADVICE}")

    @torch.no_grad()
    def restore_finite_(self) -> bool:
        """Give what is trained the last values whose loss was finite, and say whether there were any."""
        if self._finite is None:
            return False
        for name, tensor in self._trainable().items():
            tensor.copy_(self._finite[1][name])
        return True

    def _trainable(self) -> dict[str, Tensor]:
        named = cast("nn.Module", self.model).named_parameters()
        return {name: parameter.detach() for name, parameter in named if parameter.requires_grad}

    def _check(self, loss: Tensor) -> None:
        # Every process has to stop at the same step, or the others wait for it in vain.
        if not self.accelerator.gather(loss.isfinite()[None]).all():
            raise NotFiniteError(f"The loss of step {self.state.global_step + 1} is {float(loss):g}; {ADVICE}")


@contextmanager
def to_train(model: M, arguments: TrainingArguments) -> Iterator[M]:
    """The model that the Trainer gets: itself, or with FSDP, whose shards stay shards, a copy that it takes over at
    the end of `with`, where all processes have to come.
    """
    if not arguments.fsdp:
        yield model
        return
    before = set(os.environ)
    try:
        copied = deepcopy(model)
        yield copied
        take_over_(model, copied)
    finally:
        # accelerate tells the rest of the process through the environment, as if it had been launched that way.
        for name in set(os.environ) - before:
            if name.startswith(("ACCELERATE_USE_FSDP", "FSDP_")):
                del os.environ[name]


@torch.no_grad()
def take_over_(model: nn.Module, trained: nn.Module) -> None:
    """Give a model the values of what is trainable in it, which may be in shards; all processes have to come here."""
    shards = dict(trained.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            shard = shards[name].to(parameter.device)
            parameter.copy_(shard.full_tensor() if isinstance(shard, DTensor) else shard)


def train_(
    trainer: DistillTrainer, callbacks: Iterable[TrainerCallback] = (), checkpoint: str | None = None
) -> RecoveryOutcome:
    """Train until the end, or until the last step whose loss was finite, and say what it cost and why it stopped."""
    for callback in callbacks:
        trainer.add_callback(callback)
    if checkpoint is not None and isinstance(trainer.model, PeftModel):
        check_adapter(trainer.model, checkpoint)
    stopped, start = "", perf_counter()
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
        trainer.check_weights()
    except NotFiniteError as error:
        if not trainer.restore_finite_():
            raise
        stopped = f"{error} Training stopped there, and the last weights with a finite loss were kept."
    except StructPruneError:
        raise
    except Exception as error:
        where, reason = f"Training stopped at step {trainer.state.global_step}", one_line(error)
        if checkpoint is not None and trainer._finite is None:  # no step was taken
            raise StructPruneError(
                f"{checkpoint} cannot be resumed from: {type(error).__name__}: {reason or 'a file is cut off'}. "
                "Remove it, so that the one before is taken, or start without resuming."
            ) from error
        if is_write_error(error):
            raise StructPruneError(
                f"{where} because a checkpoint could not be written: {reason}. The model is as it was; resuming goes "
                "on from the last complete checkpoint."
            ) from error
        if isinstance(error, LIBRARY_ERRORS):
            raise StructPruneError(f"{where}: {type(error).__name__}: {reason}. The model is as it was.") from error
        raise
    return RecoveryOutcome(
        tokens=trainer.tokens_seen(),
        steps=trainer.state.global_step,
        seconds=perf_counter() - start,
        stopped=stopped,
        learning_rate=trainer.args.learning_rate,
    )


def load_teacher(
    teacher: PreTrainedModel | str | Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    teacher_tokenizer: PreTrainedTokenizerBase | None = None,
    trust_remote_code: bool = False,
    arch_file: str | None = None,
) -> PreTrainedModel:
    """A teacher that a model can be compared with; from an id or folder, it is loaded as the model is. Where the model
    has lost tokens, a teacher loses them too, or a copy of it. Teachers of unknown tokens are taken at their number.
    """
    given = teacher
    if isinstance(teacher, (str, Path)):
        try:
            teacher = AutoModelForCausalLM.from_pretrained(
                teacher, dtype=model.dtype, device_map=model.device, trust_remote_code=trust_remote_code
            )
        except (OSError, ValueError) as error:
            raise StructPruneError(f"The teacher {str(teacher)!r} cannot be loaded: {error}") from error
    elif not (isinstance(teacher, nn.Module) and hasattr(teacher, "config") and predicts_next(teacher)):
        kind = type(teacher).__name__
        raise StructPruneError(f"teacher takes a causal language model, or its id or folder, got {kind}.")
    if teacher is model or teacher is not given and _same(teacher, model):
        raise StructPruneError(
            "The teacher is the model that is trained, from which it learns nothing; take the model that was pruned, "
            "or leave the teacher out."
        )
    taught, learnt = (each.config.get_text_config().vocab_size for each in (teacher, model))
    reader = teacher_tokenizer or reader_of(teacher, trust_remote_code)
    if taught == learnt and None in (reader, tokenizer):
        return teacher
    sizes = f"The teacher has a vocabulary of {taught} tokens and the model one of {learnt}"
    if reader is None or tokenizer is None:
        raise StructPruneError(
            f"{sizes}, and nothing says which are the same; pass its tokenizer (teacher_tokenizer)."
        )
    keep = ids_in(reader, tokenizer, learnt)
    if learnt < taught:  # of rows without a token, those stay that the configs name, and then the first ones
        own, theirs = (1 + max(of.get_vocab().values()) for of in (tokenizer, reader))
        padding, named = range(theirs, taught), named_ids(teacher)
        keep[own:] = sorted(sorted(padding, key=lambda row: row not in named)[: max(learnt - own, 0)])
    # What is left of a vocabulary is in the same order.
    if -1 in keep or len(keep) < learnt or keep != sorted({*keep}) or keep[-1] >= taught:
        raise StructPruneError(
            f"{sizes}, and by the same ids they mean other tokens, so their predictions cannot be compared; take the "
            "model that was pruned as the teacher, or leave the teacher out."
        )
    if learnt < taught:
        teacher = deepcopy(teacher) if teacher is given else teacher
        drop_tokens_(teacher, describe(teacher, arch_file), keep)
    return teacher


def _same(teacher: PreTrainedModel, model: PreTrainedModel) -> bool:
    """Whether two models are the same, down to the weights."""
    return computing(teacher.config) == computing(model.config) and weights_hash(teacher) == weights_hash(model)


class TrainingSamples(Dataset):
    """Samples as the Trainer takes them; `ids` has the shape `(samples, seq_length)`."""

    def __init__(self, ids: Tensor):
        self.ids = ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[row], "labels": self.ids[row]}


# Folding an adapter into the weights rounds them, so that a model which has learnt nothing may lose this much.
ROUNDING = 1e-4


class WorseModelWarning(UserWarning):
    """A training made a model worse on held-out text, or ended early."""


@dataclass
class RecoveryOutcome(RecoveryReport):
    """What a training did, and whether it made the model worse by the mean log perplexity on held-out text."""

    worse: bool = False
    learning_rate: float = 0.0
    teacher: str = ""

    def judge(self) -> None:
        """Set `worse` from `perplexity`, as the first process has it, and warn of a worse model or an early end."""
        before, after = (self.mean_log_perplexity(when) for when in ("pruned", "recovered"))
        worse = after > before + ROUNDING or not isfinite(after) and isfinite(before) or isnan(after)
        self.worse = broadcast_object_list([worse])[0]
        if self.worse:
            warn(self.verdict(), WorseModelWarning)
        elif self.stopped:
            warn(self.stopped, WorseModelWarning)

    def mean_log_perplexity(self, when: str) -> float:
        """The logarithm of the perplexity on held-out text, in the mean over the domains."""
        return fmean(log(perplexity[when]) for perplexity in self.perplexity.values())

    def verdict(self) -> str:
        """A sentence on a model that is worse, with both perplexities and the learning rate."""
        means = (self.mean_log_perplexity(when) for when in ("pruned", "recovered"))
        before, after = (exp(mean) if isfinite(mean) else mean for mean in means)
        return (
            f"Recovery made the model worse: its perplexity on held-out text was {before:.2f} and is {after:.2f}, in "
            f"the geometric mean over the domains; a learning rate below {self.learning_rate:g} may help."
        )

    def __str__(self) -> str:
        """The table of the report, and a sentence where the model is worse."""
        return "\n".join([super().__str__(), *([self.verdict()] if self.worse else [])])
