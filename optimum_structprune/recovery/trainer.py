"""A Trainer whose loss compares the model with a teacher, and which stops at the first loss that is not finite."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from math import ceil
from pathlib import Path
from time import perf_counter
from typing import Any, TypeVar, cast, get_type_hints

import torch
from huggingface_hub.dataclasses import type_validator
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy
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
from ..config.recovery import BATCH_SIZE, RATES, SHORT, TRAINING, RecoveryConfig
from ..domains.readers import ids_in, reader_of
from ..errors import StructPruneError, one_line
from ..forward.metrics import divergence, evaluating, perplexity_errors, perplexity_of
from ..record.report import RecoveryReport
from ..removals.resize import drop_tokens_
from ..system.disk import is_write_error
from ..system.fingerprint import computing
from .adapter import check_adapter
from .resume import weights_hash
from .samples import IGNORED, Teacher, collate, logits_at
from .text import ANSWERS, LEFT_OUT


M = TypeVar("M", bound=nn.Module)

# What libraries raise where a value of `config.training` is of no use to them.
LIBRARY_ERRORS = (TypeError, ValueError, AttributeError, KeyError, ImportError, RuntimeError, AssertionError)
ADVICE = "lower training['learning_rate'], or train in float32 or bfloat16."
# The best checkpoint is given back, and a training ends that has brought nothing for so many checkpoints.
BEST = {"load_best_model_at_end": True, "metric_for_best_model": "distance", "greater_is_better": False}
PATIENCE = 4


class NotFiniteError(StructPruneError):
    """The loss is NaN or infinite."""


class NothingGainedError(Exception):
    """A training brought a model no nearer to its teacher; it has the `outcome`, and whoever trains takes it back."""

    def __init__(self, outcome: RecoveryOutcome):
        super().__init__("the training brought nothing")
        self.outcome = outcome


def training_arguments(config: RecoveryConfig, seed: int, on_cpu: bool, scratch: str) -> TrainingArguments:
    """The arguments of the Trainer: `config.training` laid over the defaults."""
    with _readable("TrainingArguments: "):
        own = _typed(config.training)
        saving: dict[str, Any] = {"save_strategy": "steps", "save_steps": 0.125, "save_total_limit": 1}
        if "output_dir" not in own:  # nothing is resumed from there
            saving |= {"output_dir": scratch, "save_only_model": not own.get("fsdp")}
        # All columns are the model's arguments, whatever the signature of an adapter around it says.
        fixed = {"seed": seed, "use_cpu": on_cpu, "remove_unused_columns": False}
        batch_size = 1 if config.tokens < SHORT else BATCH_SIZE
        rate = {"learning_rate": RATES[config.train], "per_device_train_batch_size": batch_size}
        settings = {**TRAINING, **rate, **saving, **fixed, **own}
        _check_use(build(TrainingArguments, settings))
        if settings["save_strategy"] == "steps":
            settings |= {"eval_strategy": "steps", "eval_steps": settings["save_steps"], **BEST}
        return build(TrainingArguments, settings)


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
            "leave them out, it measures how far the model is from its teacher at each checkpoint."
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


class BestCheckpoint(TrainerCallback):
    """Has the last step measured too, lets no checkpoint count that is no nearer to the teacher than the model was
    `before`, and ends a training that comes no nearer for long.
    """

    def __init__(self, before: float):
        self.before = before

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin with the distance before the training as the best one."""
        state.best_metric = self.before if state.best_metric is None else state.best_metric

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Have the last step measured and saved."""
        if state.global_step >= state.max_steps or control.should_training_stop:
            control.should_evaluate = control.should_save = True

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop where the best checkpoint lies far back."""
        since = state.global_step - (state.best_global_step or 0)
        if kwargs["metrics"]["eval_distance"] >= state.best_metric and since >= PATIENCE * state.eval_steps:
            control.should_training_stop = True


class DistillTrainer(Trainer):
    """Trains what is trainable of a model on samples, and measures at each checkpoint how far it is from its teacher:
    `distance` takes the model, and is lower the nearer it is.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        arguments: TrainingArguments,
        samples: Dataset,
        recovery: RecoveryConfig,
        teacher: Teacher | None = None,
        distance: Callable[[Any], float] | None = None,
    ):
        data: Any = {"train_dataset": samples, "eval_dataset": samples}  # the second is not used, and asked for
        with _readable("The Trainer cannot be made: "):
            super().__init__(model=model, args=arguments, data_collator=cast("Any", collate), **data)
        # The loss is a mean over as many places in each sample, so the Trainer may average over accumulation steps.
        self.model_accepts_loss_kwargs = False
        self.recovery, self.teacher, self.distance = recovery, teacher, distance
        self.stopped, self.begun = "", False

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as `Trainer.train` does."""
        try:
            with (
                evaluating(*([self.teacher.model] if self.teacher and self.teacher.model is not None else [])),
                _saved_by_own_names(self.model),
            ):
                return super().train(*args, **kwargs)
        finally:
            # accelerate leaves a `forward` that computes in mixed precision on the model itself.
            self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)

    def tokens_seen(self) -> int:
        """The number of tokens that counted in the loss, each sample once an epoch also where the last batch of
        several processes is filled up with it.
        """
        arguments, samples = self.args, cast("Any", self.train_dataset)
        batch = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
        seen = min(self.state.global_step * batch, len(samples) * ceil(self.state.epoch or 0))
        return seen * int((samples[0]["targets"] != IGNORED).sum()) if seen else 0

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The divergence from the teacher, mixed with cross-entropy where the config says so."""
        logits, weight = logits_at(model, inputs), self.recovery.kl_weight if self.teacher else 0
        loss = logits.new_zeros(())
        if weight < 1:
            targets = inputs["targets"][inputs["targets"] != IGNORED].to(logits.device)
            loss = (1 - weight) * cross_entropy(logits.float(), targets)
        if self.teacher is not None and weight:
            with torch.no_grad(), self.accelerator.autocast():
                taught = self.teacher.logits(inputs).to(logits.device)
            loss = loss + weight * divergence(logits, taught)
        self._check(loss.detach())
        return (loss, logits) if return_outputs else loss

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Measure the distance, as `Trainer.evaluate` would a loss."""
        assert self.distance is not None
        metrics = {"eval_distance": self.distance(self.model)}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def nearest(self) -> float:
        """The least distance of a checkpoint, or where none is compared, that of the model."""
        assert self.distance is not None
        best = self.args.load_best_model_at_end
        return cast("float", self.state.best_metric) if best else self.distance(self.model)

    def _check(self, loss: Tensor) -> None:
        self.begun = True
        # Every process has to stop at the same step, or the others wait for it in vain.
        if self.stopped or self.accelerator.gather(loss.isfinite()[None]).all():
            return
        message = f"The loss of step {self.state.global_step + 1} is {float(loss):g}; {ADVICE}"
        if self.state.best_model_checkpoint is None:
            raise NotFiniteError(message)
        self.stopped = f"{message} Training stopped there, and the best checkpoint before it was kept."
        self.control.should_training_stop = True


@contextmanager
def _saved_by_own_names(model: Any) -> Iterator[None]:
    """Checkpoints inside `with` name the weights as the model does. The Trainer loads them by these names and passes
    over all others, and the format that is published has others for the experts of a mixture.
    """
    if isinstance(model, PeftModel):
        yield
        return
    model.save_pretrained = partial(model.save_pretrained, save_original_format=False)
    try:
        yield
    finally:
        del model.save_pretrained


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
    """Train until the end, or until nothing is gained, and say what it cost, what was kept and why it stopped."""
    for callback in callbacks:
        trainer.add_callback(callback)
    if checkpoint is not None and isinstance(trainer.model, PeftModel):
        check_adapter(trainer.model, checkpoint)
    start = perf_counter()
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except StructPruneError:
        raise
    except Exception as error:
        where, reason = f"Training stopped at step {trainer.state.global_step}", one_line(error)
        if checkpoint is not None and not trainer.begun:  # no step was taken
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
        stopped=trainer.stopped,
        kept_step=trainer.state.best_global_step or trainer.state.global_step,
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
    argument = teacher
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
    if teacher is model or teacher is not argument and _same(teacher, model):
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
        teacher = deepcopy(teacher) if teacher is argument else teacher
        drop_tokens_(teacher, describe(teacher, arch_file), keep)
    return teacher


def _same(teacher: PreTrainedModel, model: PreTrainedModel) -> bool:
    """Whether two models are the same, down to the weights."""
    return computing(teacher.config) == computing(model.config) and weights_hash(teacher) == weights_hash(model)


class NothingGainedWarning(UserWarning):
    """A training brought a model no nearer to its teacher, or ended early."""


@dataclass
class RecoveryOutcome(RecoveryReport):
    """What a training did, at which rate and with which teacher."""

    learning_rate: float = 0.0
    teacher: str = ""

    def enter(self, before: Mapping[str, Mapping[str, Tensor]], after: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Enter what `measured` found by kind of text before and after."""
        for name, of in before.items():
            losses = {"dense": of["dense"]} if "dense" in of else {}
            losses |= {"pruned": of["loss"], "recovered": after[name]["loss"]}
            if name not in (ANSWERS, LEFT_OUT):
                self.perplexity[name] = {when: perplexity_of(each) for when, each in losses.items()}
                self.perplexity_stderr[name] = perplexity_errors(losses)
                self.perplexity_tokens[name] = int(of["tokens"].sum())
            if "divergence" in of:
                pair = {"pruned": of, "recovered": after[name]}
                self.divergence[name] = {when: float(each["divergence"].mean()) for when, each in pair.items()}
