"""A Trainer whose loss compares the model with a teacher, and which stops at the first loss that is not finite."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..config.fields import build
from ..config.recovery import TRAINING, RecoveryConfig
from ..errors import StructPruneError
from ..forward.divergence import divergence, divergence_from_likeliest, hidden_distance
from ..forward.metrics import evaluating, input_device
from ..saving.report import RecoveryReport
from .adapter import check_adapter
from .teacher import LOG_PROBABILITIES, TOKENS


if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


ADVICE = "lower training['learning_rate'], or train in float32 or bfloat16."


class NotFiniteError(StructPruneError):
    """The loss is NaN or infinite."""


def training_arguments(
    config: RecoveryConfig, seed: int, on_cpu: bool, scratch: str, part: int = 1, parts: int = 1
) -> TrainingArguments:
    """The arguments of the Trainer: `config.training` laid over the defaults.

    Args:
        config: How the model is trained.
        seed: The seed of the order of the samples.
        on_cpu: Whether the model lies on the CPU.
        scratch: The folder that is named where `config.training` has no `output_dir`; nothing is saved then.
        part: The part of the training, from 1.
        parts: The number of parts. With more than one, each has a folder `round-PART` in the `output_dir`.

    Raises:
        StructPruneError: If transformers does not know a field or refuses its value.
    """
    given = dict(config.training)
    saving: dict[str, Any] = {"save_strategy": "no", "output_dir": scratch}
    if "output_dir" in given:
        saving = {"save_strategy": "steps", "save_steps": 0.1, "save_total_limit": 1}
        if parts > 1:
            given["output_dir"] = f"{given['output_dir']}/round-{part}"
    # The samples carry what the loss reads, which is more than the model's arguments.
    fixed = {"seed": seed, "use_cpu": on_cpu, "remove_unused_columns": False}
    return build(TrainingArguments, {**TRAINING, **saving, **fixed, **given})


def last_checkpoint(folder: str | None) -> str:
    """The last complete checkpoint in a folder.

    The Trainer writes its state last, so a checkpoint without it was cut short by a kill, and the one before is still
    there then.

    Args:
        folder: The `output_dir` of a training.

    Raises:
        StructPruneError: If there is no complete checkpoint.
    """
    complete = [path.parent for path in Path(folder or "").glob(f"{PREFIX_CHECKPOINT_DIR}-*/{TRAINER_STATE_NAME}")]
    if folder is None or not complete:
        raise StructPruneError(f"There is no checkpoint in {folder} to resume from; start without resuming.")
    return str(max(complete, key=lambda path: int(path.name.rpartition("-")[2])))


class DistillTrainer(Trainer):
    """Trains the adapter of a model.

    Args:
        model: A model with an adapter.
        arguments: The arguments of the Trainer.
        samples: The training text, as `TrainingSamples` gives it.
        recovery: The config that weighs the terms of the loss.
        teacher: The model to agree with. Where it is None and `samples` bring no predictions of it along, the loss is
            cross-entropy alone.
    """

    def __init__(
        self,
        model: PeftModel,
        arguments: TrainingArguments,
        samples: Dataset,
        recovery: RecoveryConfig,
        teacher: PreTrainedModel | None = None,
    ):
        super().__init__(model=model, args=arguments, train_dataset=samples)
        # The loss is a mean over equally long samples, so the Trainer may average over accumulation steps.
        self.model_accepts_loss_kwargs = False
        self.recovery = recovery
        self.teacher = teacher
        # The step and the adapter at its beginning, of the last step with a finite loss.
        self._finite: tuple[int, dict[str, Tensor]] | None = None

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as `Trainer.train` does, with the teacher in eval mode."""
        with evaluating(*([] if self.teacher is None else [self.teacher])):
            return super().train(*args, **kwargs)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Cross-entropy, mixed with the divergence from the teacher.

        Raises:
            NotFiniteError: If the loss is NaN or infinite.
        """
        stored = {name: inputs[name] for name in (TOKENS, LOG_PROBABILITIES) if name in inputs}
        model_inputs = {name: value for name, value in inputs.items() if name not in stored}
        outputs = model(**model_inputs, output_hidden_states=bool(self.teacher and self.recovery.hidden_weight))
        loss = outputs.loss
        if stored:
            loss = self._mixed(loss, self._stored_divergence(outputs.logits, stored))
        elif self.teacher is not None:
            loss = self._with_teacher(loss, outputs, self._teacher_outputs(inputs["input_ids"]))
        self._check(loss)
        if self._finite is None or self._finite[0] != self.state.global_step:
            weights = {name: tensor.clone() for name, tensor in self._trainable().items()}
            self._finite = self.state.global_step, weights
        return (loss, outputs) if return_outputs else loss

    def check_weights(self) -> None:
        """Refuse weights that the last step has spoilt; no loss is computed after it that would show it.

        Raises:
            NotFiniteError: If a weight is NaN or infinite.
        """
        if not all(tensor.isfinite().all() for tensor in self._trainable().values()):
            raise NotFiniteError(f"The weights after step {self.state.global_step} are not finite; {ADVICE}")

    @torch.no_grad()
    def restore_finite_(self) -> bool:
        """Give the adapter the last values whose loss was finite.

        Returns:
            Whether there were any.
        """
        if self._finite is None:
            return False
        for name, tensor in self._trainable().items():
            tensor.copy_(self._finite[1][name])
        return True

    def _trainable(self) -> dict[str, Tensor]:
        model = self.model
        assert model is not None
        return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}

    @torch.no_grad()
    def _teacher_outputs(self, ids: Tensor) -> Any:
        teacher = self.teacher
        assert teacher is not None
        hidden = bool(self.recovery.hidden_weight)
        with self.accelerator.autocast():
            return teacher(ids.to(input_device(teacher)), use_cache=False, output_hidden_states=hidden)

    def _with_teacher(self, loss: Tensor, outputs: Any, theirs: Any) -> Tensor:
        recovery, device = self.recovery, outputs.logits.device
        if recovery.kl_weight:
            logits = theirs.logits.to(device)
            temperature, direction, top_k = float(recovery.temperature), recovery.direction, recovery.top_k
            loss = self._mixed(loss, divergence(outputs.logits, logits, temperature, direction, top_k))
        if recovery.hidden_weight:
            # The first one is the embeddings, before any layer.
            hidden = [state.to(device) for state in theirs.hidden_states[1:]]
            loss = loss + recovery.hidden_weight * hidden_distance(outputs.hidden_states[1:], hidden)
        return loss

    def _stored_divergence(self, logits: Tensor, stored: dict[str, Tensor]) -> Tensor:
        temperature, direction = float(self.recovery.temperature), self.recovery.direction
        return divergence_from_likeliest(logits, stored[TOKENS], stored[LOG_PROBABILITIES], temperature, direction)

    def _mixed(self, loss: Tensor, divergence: Tensor) -> Tensor:
        weight = self.recovery.kl_weight
        return (1 - weight) * loss + weight * divergence

    def _check(self, loss: Tensor) -> None:
        # Every process has to stop at the same step, or the others wait for it in vain.
        finite = torch.isfinite(loss.detach()).float()
        if not self.accelerator.gather(finite[None]).all():
            raise NotFiniteError(
                f"The loss of step {self.state.global_step + 1} is {float(loss.detach()):g}; {ADVICE}"
            )


def train_adapter_(
    trainer: DistillTrainer, callbacks: Iterable[TrainerCallback] = (), checkpoint: str | None = None
) -> RecoveryReport:
    """Train until the end, or until the last step whose loss was finite.

    Args:
        trainer: The trainer of the adapter.
        callbacks: Further callbacks.
        checkpoint: The folder of the checkpoint to go on from; None starts anew.

    Returns:
        What the training cost, and why it stopped if it did.

    Raises:
        StructPruneError: If the checkpoint belongs to another model, or a checkpoint cannot be written.
        NotFiniteError: If no loss was finite.
    """
    for callback in callbacks:
        trainer.add_callback(callback)
    if checkpoint is not None:
        check_adapter(cast("PeftModel", trainer.model), checkpoint)
    stopped = ""
    start = perf_counter()
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
        trainer.check_weights()
    except (OSError, SafetensorError) as error:
        raise StructPruneError(
            f"Training stopped at step {trainer.state.global_step} because a checkpoint could not be written: "
            f"{error}. The model is as it was; resuming goes on from the last complete checkpoint."
        ) from error
    except NotFiniteError as error:
        if not trainer.restore_finite_():
            raise
        stopped = f"{error} Training stopped there, and the last good weights were kept."
    return RecoveryReport(
        tokens=int(trainer.state.num_input_tokens_seen),
        steps=trainer.state.global_step,
        seconds=perf_counter() - start,
        stopped=stopped,
    )
