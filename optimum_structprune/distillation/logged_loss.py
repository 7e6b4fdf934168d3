"""A loss of a Trainer that logs its divergence from a teacher."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from ..arch.inference import without_dropout


class LoggedLoss:
    """The part of the losses with a teacher that does not depend on the outputs of the models.

    Attributes:
        trainer: The Trainer.
        value: The name of the divergence in the logs.
        teacher: The teacher.
        temperature: The temperature of both distributions.
        task_weight: The weight of the loss without the teacher.
    """

    # The loss of a batch in the mode "train" or "eval", with the arguments of `transformers.Trainer.compute_loss`.
    batch_loss: Callable[..., Any]

    def __init__(self, trainer: Trainer, value: str, teacher: Any, temperature: float, task_weight: float):
        self.trainer = trainer
        self.value = value
        self.teacher = teacher
        self.temperature = temperature
        self.task_weight = task_weight
        # The sums of the divergence and of the items since the last log, on the device, so that no step waits for the
        # CPU.
        self._sums: dict[str, Tensor] = {}
        # Whether the Trainer reads the logits of an evaluation.
        self._returns_logits = False

    def attach(self) -> None:
        """Replace the loss of the Trainer, and add the divergence to its logs."""
        trainer: Any = self.trainer
        trainer.compute_loss = self.compute_loss
        trainer.log = partial(self.log, trainer.log)
        trainer.evaluation_loop = partial(self.evaluation_loop, trainer.evaluation_loop)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Compute the loss of a batch; see `transformers.Trainer.compute_loss`.

        The student computes as in eval mode, like the teacher. With dropout, a student that equals its teacher would
        have a divergence, and the training would move it away. Only the dropout of an adapter acts, because the user
        sets it for this training, and a new adapter does not change the outputs.

        Args:
            model: The student, as the Trainer wraps it.
            inputs: The batch.
            return_outputs: Whether to return the model's outputs too. They only have logits if the Trainer computes
                metrics or predictions.
            num_items_in_batch: The number of counted tokens in the accumulated batch of all processes.

        Raises:
            StructPruneError: If a causal language model gets a batch without `input_ids` or `labels`.
        """
        mode = "eval"
        with ExitStack() as stack:
            if model.training:
                mode = "train"
                student: Any = self.trainer.model
                stack.enter_context(without_dropout(model, student))
            return self.batch_loss(mode, model, inputs, return_outputs, num_items_in_batch)

    def evaluation_loop(self, evaluation_loop: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Evaluate without earlier losses of the model in eval mode, such as the losses of trial steps."""
        self._sums.pop("eval", None)
        self._returns_logits = not (kwargs.get("prediction_loss_only") or self.trainer.args.prediction_loss_only)
        try:
            return evaluation_loop(*args, **kwargs)
        finally:
            self._returns_logits = False

    def log(self, log: Callable[..., None], logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the mean divergence to the Trainer's logs as `kl`, and to evaluations as `eval_kl`; see `value`."""
        for name in list(logs):
            if name == "loss":
                self._enter(logs, "train", self.value)
            elif name.endswith("_loss") and name != "train_loss":
                self._enter(logs, "eval", f"{name.removesuffix('_loss')}_{self.value}")
        log(logs, *args, **kwargs)

    def _enter(self, logs: dict[str, float], mode: str, name: str) -> None:
        sums = self._sums.pop(mode, None)
        if sums is None:
            return

        kl, tokens = self.trainer.accelerator.gather(sums[None]).sum(0).tolist()
        logs[name] = round(kl / max(tokens, 1.0), 6)

    @property
    def _num_batches(self) -> int:
        """Return the number of batches that are computed at once. A tensor-parallel group shares one batch."""
        return self.trainer.accelerator.num_processes // self.trainer.get_tp_size()

    def _mean(self, losses: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor:
        """Average the losses of tokens. The sum over accumulated batches is then the mean over all their tokens."""
        total = losses.sum().to(self.trainer.args.device)
        if num_items_in_batch is None:
            return total / max(len(losses), 1)

        mean = total / torch.as_tensor(num_items_in_batch, device=total.device).clamp(min=1)
        if self.trainer.args.average_tokens_across_devices:
            # The number counts the tokens of all processes, and DDP averages the gradients over them.
            mean = mean * self._num_batches
        return mean
