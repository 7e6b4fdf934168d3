"""Choose the learning rate of a recovery by trial steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import inf, isnan
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor
from transformers import Trainer

from ..arch.inference import evaluating
from ..system.stages import progress


# Trial rates, as shares of the default rate.
SHARES = (1.0, 0.3, 0.1, 0.03, 0.01)
NUM_TRIAL_SAMPLES = 4


def lower_learning_rate_(
    trainer: Trainer, batches: Sequence[dict[str, Tensor]], take_back: Callable[[], None]
) -> None:
    """Multiply the learning rate by the best of five shares: the share with the smallest loss after a trial step.

    The first step of Adam moves every weight by the rate, in the direction of the gradient's sign. Small models need
    smaller steps. The trials end once a rate lowers the loss and a smaller rate lowers it less.

    Args:
        trainer: The Trainer, with its optimizer.
        batches: Batches of one sample each, for the trial steps.
        take_back: A function that restores the weights.
    """
    model: Any = trainer.model
    assert trainer.optimizer is not None
    groups = trainer.optimizer.param_groups

    num_batches = len(batches) * (1 + len(SHARES))
    bar = progress(range(num_batches), desc="Choosing the learning rate", unit="batch", leave=False)

    def loss_of(batch: dict[str, Tensor]) -> Tensor:
        next(bar, None)
        # The cache of autocast would keep the weights of an earlier trial.
        with trainer.accelerator.autocast():
            loss: Tensor = trainer.compute_loss(model, trainer._prepare_inputs(dict(batch)))  # type: ignore[assignment]
        return loss

    @torch.no_grad()
    def loss_after_step(share: float) -> float:
        for group in groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    weight.sub_(weight.grad.sign(), alpha=share * group["lr"])

        loss = sum(loss_of(batch).item() for batch in batches)
        take_back()
        if isnan(loss):
            return inf
        return loss

    with evaluating(model):
        first_loss = 0.0
        for batch in batches:
            loss = loss_of(batch)
            loss.backward()
            first_loss += loss.item()
        # All processes run the same trials, so they use the losses of the first process.
        first_loss = broadcast_object_list([first_loss])[0]

        best_share = SHARES[0]
        best_loss = inf
        for share in SHARES:
            loss_after = broadcast_object_list([loss_after_step(share)])[0]
            if loss_after > best_loss and best_loss < first_loss:
                break
            if loss_after < best_loss:
                best_share = share
                best_loss = loss_after

    model.zero_grad()
    trainer.args.learning_rate *= best_share
    for group in groups:
        group["lr"] *= best_share
