"""Run the Trainer of a recovery. If the training fails, the model is unchanged."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from math import isfinite
from typing import Any

from peft import PeftModel
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK
from transformers.trainer_utils import IntervalStrategy

from ..distillation.attach import attach_loaded_teacher
from ..distillation.teacher import Teacher
from ..distillation.teacher_file import StoredTeacher
from ..measure.batches import SampleCollator
from ..system.disk import is_write_error
from ..system.errors import StructPruneError, one_line, reason_of
from ..system.stages import progress, say, stage
from .adapter import LIBRARY_ERRORS
from .teacher_cache import CachedData
from .training_data import RecoveryData


# Accelerate sets these attributes on a model, and does not prepare a model that has them for another training.
ACCELERATE_ATTRIBUTES = {"forward", "_is_accelerate_prepared"}
# The progress of a training shows the mean of this number of logged losses, because batches of text and of answers
# have different losses.
SHOWN_LOGS = 10


class NothingGainedWarning(UserWarning):
    """A training did not bring a model nearer to its teacher, or ended early."""


class StopAtNaN(TrainerCallback):
    """End a training whose loss is not finite, as soon as the loss is logged.

    Attributes:
        message: The reason for the end of the training, or an empty text if it did not end early.
    """

    def __init__(self) -> None:
        self.message = ""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """End the training if the loss is not finite. All processes log the same mean loss, so they all end."""
        loss = (logs or {}).get("loss", 0.0)
        if isfinite(loss) or self.message:
            return

        steps = f"step {state.global_step}"
        start = max(1, state.global_step - args.logging_steps + 1)
        if start < state.global_step:
            steps = f"steps {start:.0f} to {state.global_step}"
        self.message = (
            f"The loss of {steps} is {loss:g}, and training stopped there. Lower `learning_rate` in `training`, "
            "or train in float32 or bfloat16."
        )
        control.should_training_stop = True


class ShowProgress(TrainerCallback):
    """Show the steps, the tokens and the smoothed loss of a training, and its evaluations.

    Args:
        value: The shown value of the logs: `kl` or `loss`.
        tokens_after: A function from a number of steps to the number of tokens that they read.
    """

    def __init__(self, value: str, tokens_after: Callable[[int], int]) -> None:
        self.value = value
        self.label = value.replace("kl", "KL")
        self.tokens_after = tokens_after
        self._tokens = 0
        self._losses: deque[float] = deque(maxlen=SHOWN_LOGS)
        self._steps: Iterator[int] = iter(())
        self._batches: Iterator[int] | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Draw the bar."""
        if state.is_world_process_zero:
            self._steps = progress(
                range(state.global_step, state.max_steps),
                note=self._note,
                initial=state.global_step,
                total=state.max_steps,
                unit="step",
                disable=args.disable_tqdm,
            )
            next(self._steps, None)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count a step."""
        self._tokens = self.tokens_after(state.global_step)
        next(self._steps, None)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Remember the loss of the last steps."""
        loss = (logs or {}).get(self.value)
        if loss is not None:
            self._losses.append(loss)

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        """Count a batch of an evaluation. The bar begins after the first batch."""
        if not state.is_world_process_zero:
            return
        if self._batches is None:
            total = len(eval_dataloader)
            self._batches = progress(
                range(1, total),
                desc="Evaluating the checkpoint",
                initial=1,
                total=total,
                unit="batch",
                leave=False,
                disable=args.disable_tqdm,
            )
        next(self._batches, None)

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float] | None = None, **kwargs: Any
    ) -> None:
        """Print the result of an evaluation."""
        self._batches = None
        loss = (metrics or {}).get(f"eval_{self.value}")
        if state.is_world_process_zero and loss is not None:
            say(f"Step {state.global_step} of {state.max_steps}: validation {self.label} {loss:.4f}")

    def close(self) -> None:
        """Close the bars."""
        self._batches = None
        self._steps = iter(())

    def _note(self) -> str:
        """Return the number of tokens and the smoothed loss."""
        note = f"{self._tokens:,} tokens"
        if self._losses:
            note += f", {self.label} {sum(self._losses) / len(self._losses):.4f}"
        return note


class EvaluateLastStep(TrainerCallback):
    """Evaluate after the last step too, so that it can be the best checkpoint."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Request an evaluation and a checkpoint if the training ends."""
        is_last = state.global_step >= state.max_steps or control.should_training_stop
        if is_last and args.eval_strategy == IntervalStrategy.STEPS:
            control.should_evaluate = True
            control.should_save = True


def recovery_trainer(
    model: Any,
    arguments: TrainingArguments,
    data: RecoveryData | CachedData,
    collator: SampleCollator,
    teacher: Teacher | StoredTeacher | None,
    callbacks: Sequence[TrainerCallback],
) -> Trainer:
    """Return a Trainer for the data of a recovery, with the teacher attached.

    Raises:
        StructPruneError: If the Trainer refuses the arguments.
    """
    use_cache = getattr(model.config, "use_cache", None)
    all_callbacks = list(callbacks)
    all_callbacks.append(EvaluateLastStep())

    try:
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=data.stream,  # type: ignore[arg-type]
            eval_dataset=data.validation,  # type: ignore[arg-type]
            data_collator=collator,
            callbacks=all_callbacks,
        )

        remove_printers(trainer)
        if use_cache is not None:
            model.config.use_cache = use_cache  # the Trainer turns it off and does not restore it
        if teacher is not None:
            attach_loaded_teacher(trainer, teacher)
        trainer.create_optimizer()  # trial steps need its learning rates

    except LIBRARY_ERRORS as error:
        if isinstance(error, StructPruneError):
            raise
        raise StructPruneError(f"TrainingArguments: {one_line(error)}") from error
    return trainer


def remove_printers(trainer: Trainer) -> None:
    """Remove the progress of the Trainer, which `ShowProgress` replaces."""
    for printer in (PrinterCallback, DEFAULT_PROGRESS_CALLBACK):
        trainer.remove_callback(printer)


def train(trainer: Trainer, checkpoint: str | None) -> float:
    """Train, and return the number of seconds.

    Args:
        trainer: The Trainer.
        checkpoint: The checkpoint to resume from, or None.

    Raises:
        StructPruneError: If the settings, the text, a checkpoint or the disk end the training.
    """
    model: Any = trainer.model
    if isinstance(model, PeftModel):
        base_model = model.get_base_model()
    else:
        base_model = model
        # The Trainer loads a checkpoint by the model's own names. The published format has other names for experts.
        model.save_pretrained = partial(model.save_pretrained, save_original_format=False)

    attributes_before = set(vars(model))
    try:
        with stage("training", {}):
            output = trainer.train(resume_from_checkpoint=checkpoint)
    except Exception as error:
        # A damaged checkpoint raises errors of many kinds.
        if isinstance(error, StructPruneError) or not (checkpoint or isinstance(error, LIBRARY_ERRORS)):
            raise
        raise StructPruneError(_advice(error, trainer, checkpoint)) from error
    finally:
        vars(model).pop("save_pretrained", None)
        # accelerate leaves a `forward` that computes in mixed precision on the model itself.
        trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        for name in ACCELERATE_ATTRIBUTES - attributes_before:
            vars(model).pop(name, None)
        if trainer.args.gradient_checkpointing:
            _end_checkpointing(base_model)
    return float(output.metrics["train_runtime"])


def _advice(error: Exception, trainer: Trainer, checkpoint: str | None) -> str:
    """Return the message for an error of a training."""
    message = (
        f"Training stopped at step {trainer.state.global_step}, {type(error).__name__}: {reason_of(error)}. The model "
        "is as it was."
    )

    if checkpoint:
        message += f" If {checkpoint} is damaged, remove it to resume from the previous checkpoint."
    if is_write_error(error):
        message += (
            f" If {trainer.args.output_dir} has no room for checkpoints, free some space, or set `save_strategy` to "
            "'no'."
        )
    return message


def _end_checkpointing(model: Any) -> None:
    """Turn off activation checkpointing, which the Trainer leaves on."""
    for module in model.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = False
    model.disable_input_require_grads()
