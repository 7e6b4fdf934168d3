"""A Trainer whose loss also asks for agreement with a teacher, and which stops at the first loss that is no number."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..config.recovery import RecoveryConfig
from ..errors import StructPruneError
from ..forward.divergence import divergence, divergence_from_likeliest, hidden_distance
from ..forward.metrics import input_device
from .teacher import LOG_PROBABILITIES, TOKENS, TrainingSamples


if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


ADVICE = "lower training['learning_rate'], or train in float32 or bfloat16."


class NotFiniteError(StructPruneError):
    """The loss is NaN or infinite."""


def last_checkpoint(folder: str | None) -> str:
    """The last whole checkpoint in a folder. A kill in the middle of writing one leaves it without the Trainer's
    state, which is written last; the one before is still there then.

    Raises:
        StructPruneError: If there is none.
    """
    whole = [path.parent for path in Path(folder or "").glob(f"{PREFIX_CHECKPOINT_DIR}-*/{TRAINER_STATE_NAME}")]
    if folder is None or not whole:
        raise StructPruneError(f"There is no checkpoint in {folder} to resume from; start without resuming.")
    return str(max(whole, key=lambda path: int(path.name.rpartition("-")[2])))


class DistillTrainer(Trainer):
    """Trains the adapter of a model.

    Args:
        model: With an adapter.
        arguments: Of the Trainer.
        samples: Training text.
        recovery: Weighs the parts of the loss.
        teacher: The model to agree with. Where it is None and `samples` bring no predictions of it along, the loss is
            cross-entropy alone.
    """

    def __init__(
        self,
        model: PeftModel,
        arguments: TrainingArguments,
        samples: TrainingSamples,
        recovery: RecoveryConfig,
        teacher: PreTrainedModel | None = None,
    ):
        super().__init__(model=model, args=arguments, train_dataset=samples)
        # The loss is a mean over equally long samples, so the Trainer may average over accumulation steps.
        self.model_accepts_loss_kwargs = False
        self.recovery = recovery
        self.teacher = teacher
        self._good: tuple[int, dict[str, Tensor]] | None = None

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """See `Trainer.train`; the teacher runs without dropout meanwhile."""
        if self.teacher is None:
            return super().train(*args, **kwargs)
        training = self.teacher.training
        self.teacher.eval()
        try:
            return super().train(*args, **kwargs)
        finally:
            self.teacher.train(training)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Cross-entropy, mixed with the divergence from the teacher.

        Raises:
            NotFiniteError: If it is NaN or infinite.
        """
        stored = {name: inputs[name] for name in (TOKENS, LOG_PROBABILITIES) if name in inputs}
        own = {name: value for name, value in inputs.items() if name not in stored}
        outputs = model(**own, output_hidden_states=bool(self.teacher and self.recovery.hidden_weight))
        loss = outputs.loss
        if stored:
            loss = self._mixed(loss, self._from_stored(outputs.logits, stored))
        elif self.teacher is not None:
            loss = self._taught(loss, outputs, self._asked(inputs["input_ids"]))
        self._check(loss)
        if self._good is None or self._good[0] != self.state.global_step:
            self._good = self.state.global_step, self._trainable(copy=True)
        return (loss, outputs) if return_outputs else loss

    def check_weights(self) -> None:
        """Look at the outcome of the last step, whose loss nobody computes any more.

        Raises:
            NotFiniteError: If a weight is NaN or infinite.
        """
        if not all(tensor.isfinite().all() for tensor in self._trainable().values()):
            raise NotFiniteError(f"The weights after step {self.state.global_step} are not finite; {ADVICE}")

    @torch.no_grad()
    def restore_good_(self) -> bool:
        """Give the adapter the last values whose loss was finite; False where there were none."""
        if self._good is None:
            return False
        for name, tensor in self._trainable().items():
            tensor.copy_(self._good[1][name])
        return True

    def _trainable(self, copy: bool = False) -> dict[str, Tensor]:
        model = self.model
        assert model is not None
        tensors = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
        return {name: tensor.clone() for name, tensor in tensors.items()} if copy else tensors

    @torch.no_grad()
    def _asked(self, ids: Tensor) -> Any:
        teacher = self.teacher
        assert teacher is not None
        hidden = bool(self.recovery.hidden_weight)
        with self.accelerator.autocast():
            return teacher(ids.to(input_device(teacher)), use_cache=False, output_hidden_states=hidden)

    def _taught(self, loss: Tensor, outputs: Any, theirs: Any) -> Tensor:
        recovery, device = self.recovery, outputs.logits.device
        if recovery.kl_weight:
            logits = theirs.logits.to(device)
            temperature, direction, top_k = float(recovery.temperature), recovery.direction, recovery.top_k
            loss = self._mixed(loss, divergence(outputs.logits, logits, temperature, direction, top_k))
        if recovery.hidden_weight:
            # The first one is the embeddings, before any sample.
            hidden = [state.to(device) for state in theirs.hidden_states[1:]]
            loss = loss + recovery.hidden_weight * hidden_distance(outputs.hidden_states[1:], hidden)
        return loss

    def _from_stored(self, logits: Tensor, stored: dict[str, Tensor]) -> Tensor:
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
