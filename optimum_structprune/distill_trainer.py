"""A Trainer whose loss also asks for agreement with a teacher, and which stops at the first loss that is no number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments

from .distill import divergence
from .errors import StructPruneError
from .recovery_config import RecoveryConfig


if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


class NotFiniteError(StructPruneError):
    """The loss is NaN or infinite."""


class DistillTrainer(Trainer):
    """Trains the adapter of a model.

    Args:
        model: With an adapter.
        arguments: Of the Trainer.
        rows: Token blocks, as `{"input_ids": …, "labels": …}`.
        recovery: Weighs the parts of the loss.
        teacher: The model to agree with; None leaves cross-entropy alone.
    """

    def __init__(
        self,
        model: PeftModel,
        arguments: TrainingArguments,
        rows: Sequence[Mapping[str, Tensor]],
        recovery: RecoveryConfig,
        teacher: PreTrainedModel | None = None,
    ):
        super().__init__(model=model, args=arguments, train_dataset=rows)  # type: ignore[arg-type]  # as a sequence
        # The loss is a mean over equally long blocks, so the Trainer may average over accumulation steps.
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
        outputs = model(**inputs)
        loss = outputs.loss
        if self.teacher is not None:
            weight = self.recovery.kl_weight
            loss = (1 - weight) * loss + weight * self._divergence(outputs.logits, inputs["input_ids"])
        if not torch.isfinite(loss):
            raise NotFiniteError(
                f"The loss of step {self.state.global_step + 1} is {float(loss.detach()):g}; "
                "lower training['learning_rate'], or train in float32 or bfloat16."
            )
        if self._good is None or self._good[0] != self.state.global_step:
            self._good = self.state.global_step, self._trainable(copy=True)
        return (loss, outputs) if return_outputs else loss

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

    def _divergence(self, logits: Tensor, ids: Tensor) -> Tensor:
        teacher, recovery = self.teacher, self.recovery
        assert teacher is not None
        with torch.no_grad():
            theirs = teacher(ids.to(teacher.device), use_cache=False).logits.to(logits.device)
        return divergence(logits, theirs, float(recovery.temperature), recovery.direction, recovery.top_k)
