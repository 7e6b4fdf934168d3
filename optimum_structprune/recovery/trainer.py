"""A Trainer whose loss compares the model with a teacher, and which stops at the first loss that is not finite."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from math import ceil
from typing import Any, cast, get_type_hints

import torch
from huggingface_hub.dataclasses import type_validator
from peft import PeftModel
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainerCallback, TrainingArguments

from ..config.fields import build
from ..config.recovery import BATCH_SIZE, RATES, SHORT, TRAINING, RecoveryConfig
from ..errors import StructPruneError, one_line
from ..forward.metrics import evaluating, perplexity_errors, perplexity_of
from ..record.report import RecoveryReport
from ..system.disk import is_write_error
from .adapter import LIBRARY_ERRORS
from .lessons import Curriculum
from .samples import by_token, collate, counted, logits_at, tokens_in
from .text import ANSWERS, LEFT_OUT


# The best checkpoint is given back, and a training ends that has brought nothing for so many checkpoints.
BEST = {"load_best_model_at_end": True, "metric_for_best_model": "distance", "greater_is_better": False}
PATIENCE = 4
# The name of what peft trains of rows of tokens, and their learning rate as a share of that of the adapter.
ROWS, ROWS_SHARE = "trainable_tokens_delta", 0.3
LEAST = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "learning_rate": 0, "seed": 0}
NOT_TAKEN = {
    "eval_strategy eval_on_start": "measures on an eval_dataset, and a recovery has none; leave it out, it measures "
    "how far the model is from its teacher at each checkpoint",
    "push_to_hub": "would upload what the training writes on its way; leave it out, and push the result with "
    "push_to_hub or --push-to-hub",
    "torch_compile torch_compile_backend torch_compile_mode": "hides what the model takes, by which samples are "
    "passed; leave it out, and compile what comes out",
    "remove_unused_columns": "would remove what is to be learnt; leave it out",
    "load_best_model_at_end": "is so by itself, where save_strategy='steps'; leave it out",
}


def training_arguments(config: RecoveryConfig, seed: int, on_cpu: bool, scratch: str) -> TrainingArguments:
    """The arguments of the Trainer: `config.training` laid over the defaults."""
    own = _typed(config.training)
    _check_use(own)
    short = config.tokens < SHORT
    settings = {
        **TRAINING,
        **{"learning_rate": RATES[config.train], "per_device_train_batch_size": 1 if short else BATCH_SIZE},
        # Measuring takes as long in a short training as in a long one.
        **{"save_strategy": "steps", "save_steps": 0.25 if short else 0.125, "save_total_limit": 1},
        # All columns are the model's arguments, whatever the signature of an adapter around it says.
        **{"seed": seed, "use_cpu": on_cpu, "remove_unused_columns": False},
        # Nothing is resumed from a scratch folder.
        **({} if "output_dir" in own else {"output_dir": scratch, "save_only_model": True}),
        **own,
    }
    if settings["save_strategy"] == "steps":
        settings |= {"eval_strategy": "steps", "eval_steps": settings["save_steps"], **BEST}
    return build(TrainingArguments, settings)


def _typed(training: Mapping[str, Any]) -> dict[str, Any]:
    """Values of the types that `TrainingArguments` declares, which it does not check itself."""
    typed, hints = dict(training), get_type_hints(TrainingArguments)
    for name, value in training.items():
        if name.endswith("_strategy") and value is False:
            typed[name] = "no"  # what YAML reads `save_strategy: no` as
        elif hints.get(name) is float and type(value) is int:
            typed[name] = float(value)
        else:
            try:
                type_validator(name, value, hints.get(name, Any))
            except (TypeError, ValueError) as error:
                raise StructPruneError(f"TrainingArguments: {one_line(error)}") from error
    return typed


def _check_use(training: Mapping[str, Any]) -> None:
    """Refuse values that `TrainingArguments` accepts and a training does not."""
    for name, least in LEAST.items():
        if training.get(name, least) < least:
            raise StructPruneError(f"TrainingArguments: {name} has to be {least} or more, got {training[name]}.")
    if training.get("max_steps") == 0:
        raise StructPruneError("TrainingArguments: max_steps has to be 1 or more, got 0; leave it out.")
    for names, why in NOT_TAKEN.items():
        if used := [name for name in names.split() if training.get(name) not in (None, False, "no")]:
            raise StructPruneError(f"TrainingArguments: {used[0]} {why}.")


class BestCheckpoint(TrainerCallback):
    """Measures the last step too, counts no checkpoint that brought nothing, and ends a training that goes on so."""

    def __init__(self, before: float):
        self.before = before

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin with the distance before the training as the best one."""
        state.best_metric = self.before if state.best_metric is None else state.best_metric

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Have the last step measured and saved, also where a callback stops the training."""
        if control.should_training_stop:
            control.should_evaluate = control.should_save = True

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop where the best checkpoint lies far back."""
        since = state.global_step - (state.best_global_step or 0)
        if kwargs["metrics"]["eval_distance"] >= state.best_metric and since >= PATIENCE * state.eval_steps:
            control.should_training_stop = True


class DistillTrainer(Trainer):
    """Trains what is trainable of a model, and measures its distance from the teacher at each checkpoint."""

    def __init__(
        self, model: Any, arguments: TrainingArguments, curriculum: Curriculum, kl_weight: float, callbacks: list[Any]
    ):
        # The Trainer asks for the second of these and does not use it.
        samples: Any = {"train_dataset": curriculum.lessons, "eval_dataset": curriculum.lessons}
        use_cache = getattr(model.config, "use_cache", None)
        try:
            super().__init__(model=model, args=arguments, callbacks=callbacks, data_collator=collate, **samples)
        except LIBRARY_ERRORS as error:
            raise StructPruneError(f"TrainingArguments: {one_line(error)}") from error
        if use_cache is not None:
            model.config.use_cache = use_cache  # the Trainer turns it off for good; samples do for each call
        # The loss is a mean over as many places in each sample, so the Trainer may average over accumulation steps.
        self.model_accepts_loss_kwargs = False
        self.curriculum, self.teacher, self.kl_weight = curriculum, curriculum.teacher, kl_weight
        self.stopped, self.begun = "", False

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as `Trainer.train` does; a StructPruneError says what settings, a checkpoint or the disk end."""
        model: Any = self.model
        if not isinstance(model, PeftModel):
            # The Trainer loads a checkpoint by the model's own names and passes over all others, and the format that
            # is published has others for the experts of a mixture.
            model.save_pretrained = partial(model.save_pretrained, save_original_format=False)
        try:
            teachers = [self.teacher.model] if self.teacher and self.teacher.model is not None else []
            with evaluating(*teachers), _without_checkpointing_afterwards(model):
                return super().train(*args, **kwargs)
        except StructPruneError:
            raise
        except Exception as error:
            resumed, reason = kwargs.get("resume_from_checkpoint"), one_line(error)
            if resumed and not self.begun:
                raise StructPruneError(
                    f"{resumed} cannot be resumed from: {type(error).__name__}: {reason or 'a file is cut off'}. "
                    "Remove it, so that the one before is taken, or start without resuming."
                ) from error
            if not isinstance(error, LIBRARY_ERRORS):
                raise
            full = is_write_error(error)
            why = " because a checkpoint could not be written" if full else f", {type(error).__name__}"
            more = "; resuming goes on from the last complete checkpoint" if full else ""
            raise StructPruneError(
                f"Training stopped at step {self.state.global_step}{why}: {reason}. The model is as it was{more}."
            ) from error
        finally:
            vars(model).pop("save_pretrained", None)
            # accelerate leaves a `forward` that computes in mixed precision on the model itself.
            self.accelerator.unwrap_model(model, keep_fp32_wrapper=False)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Make the optimizer as `Trainer.create_optimizer` does, in which rows of tokens move less."""
        made = self.optimizer is not None
        optimizer = super().create_optimizer(*args, **kwargs)
        model: Any = self.model
        rows = {id(of) for name, of in model.named_parameters() if ROWS in name}
        for group in [] if made else [*optimizer.param_groups]:
            own = [of for of in group["params"] if id(of) in rows]
            if own:
                group["params"] = [of for of in group["params"] if id(of) not in rows]
                optimizer.add_param_group({**group, "params": own, "lr": ROWS_SHARE * group["lr"]})
        return optimizer

    def outcome(self, seconds: float) -> RecoveryReport:
        """What a training of so many seconds did, which step was kept, and why it stopped."""
        return RecoveryReport(
            tokens=self.tokens_seen(),
            steps=self.state.global_step,
            seconds=seconds,
            stopped=self.stopped,
            kept_step=self.state.best_global_step or self.state.global_step,
            learning_rate=self.args.learning_rate,
        )

    def tokens_seen(self) -> int:
        """The number of tokens that counted in the loss; a sample that fills up a last batch counts once an epoch."""
        arguments, samples = self.args, cast("Any", self.train_dataset)
        batch = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
        seen = min(self.state.global_step * batch, len(samples) * ceil(self.state.epoch or 0))
        return seen * tokens_in(samples[0]) if seen else 0

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, *args: Any, **kwargs: Any
    ) -> Any:
        """The divergence from the teacher, mixed with cross-entropy where the config says so."""
        logits, weight = logits_at(model, inputs), self.kl_weight if self.teacher else 0
        loss = logits.new_zeros(())
        if weight < 1:
            losses = cross_entropy(logits.float(), counted(inputs, logits), reduction="none")
            loss = (1 - weight) * by_token(losses, inputs).mean()
        if self.teacher is not None and weight:
            with torch.no_grad(), self.accelerator.autocast():
                taught = self.teacher.logits(inputs).to(logits.device)
            loss = loss + weight * self.teacher.divergence(logits, taught, inputs).mean()
        self._check(loss.detach())
        return (loss, logits) if return_outputs else loss

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Measure the distance, as `Trainer.evaluate` would a loss."""
        metrics = {"eval_distance": self.curriculum.distance(self.model)}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def nearest(self) -> float:
        """The least distance of a checkpoint, or where none is compared, that of the model."""
        best = self.args.load_best_model_at_end
        return cast("float", self.state.best_metric) if best else self.curriculum.distance(self.model)

    def _check(self, loss: Tensor) -> None:
        self.begun = True
        # Every process has to stop at the same step, or the others wait for it in vain.
        if self.stopped or self.accelerator.gather(loss.isfinite()[None]).all():
            return
        advice = "lower training['learning_rate'], or train in float32 or bfloat16."
        message = f"The loss of step {self.state.global_step + 1} is {float(loss):g}; {advice}"
        if self.state.best_model_checkpoint is None:
            raise StructPruneError(message)
        self.stopped = f"{message} Training stopped there, and the best checkpoint before it was kept."
        self.control.should_training_stop = True


@contextmanager
def _without_checkpointing_afterwards(model: Any) -> Iterator[None]:
    """Take off what a Trainer puts on a model for gradient checkpointing, unless it was there before."""
    bare: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    modules = [module for module in bare.modules() if hasattr(module, "gradient_checkpointing")]
    before = any(module.gradient_checkpointing for module in modules)
    try:
        yield
    finally:
        if not before and any(module.gradient_checkpointing for module in modules):
            for module in modules:
                module.gradient_checkpointing = False
            bare.disable_input_require_grads()


class NothingGainedWarning(UserWarning):
    """A training brought a model no nearer to its teacher, or ended early."""


def enter_measurements(
    report: RecoveryReport, before: Mapping[str, Mapping[str, Tensor]], after: Mapping[str, Mapping[str, Tensor]]
) -> None:
    """Enter what `measure_samples` found by kind of text before and after a training."""
    for name, of in before.items():
        losses = {"dense": of["dense"]} if "dense" in of else {}
        losses |= {"pruned": of["loss"], "recovered": after[name]["loss"]}
        if name not in (ANSWERS, LEFT_OUT):
            report.perplexity[name] = {when: perplexity_of(each) for when, each in losses.items()}
            report.perplexity_stderr[name] = perplexity_errors(losses)
            report.perplexity_tokens[name] = int(of["tokens"].sum())
        if "divergence" in of:
            pair = {"pruned": of, "recovered": after[name]}
            report.divergence[name] = {when: float(each["divergence"].mean()) for when, each in pair.items()}
