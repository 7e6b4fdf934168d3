"""The KL divergence of the next-token predictions of two models. Training, evaluation and searches use it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


# A function from the probabilities of a teacher, shape `(tokens, teacher vocab)`, to a distribution over the tokens of
# the model, shape `(positions, vocab)`, and the weight of each position, shape `(positions,)`.
Align = Callable[[Tensor], tuple[Tensor, Tensor]]


def divergence(logits: Tensor, teacher: Tensor, temperature: float = 1.0, align: Align | None = None) -> Tensor:
    """Return KL(teacher‖model) in nats at each position.

    At temperature T, the distributions are p = softmax(teacher / T) and q = softmax(logits / T), and the divergence is

        KL = w · Σ_v p_v · (log p_v - log q_v)

    If the model has other tokens than the teacher, `align` computes p over the tokens of the model, and the weight w.
    Otherwise w is 1.

    Args:
        logits: The logits of the model, shape `(..., vocab)`.
        teacher: The logits of the teacher, of the same shape, or of shape `(tokens, teacher vocab)` with `align`. No
            gradient reaches them.
        temperature: The temperature of both distributions.
        align: The alignment of the tokens; see `TokenAlignment.next_part`.

    Returns:
        The divergence of each position, shape `(...)`, fp32.
    """
    with torch.no_grad():
        log_target = _log_probabilities(teacher.to(logits.device), temperature)
        target = log_target.exp()
        if align is not None:
            target, weight = align(target)
            # A token without any probability has the product 0, not NaN.
            log_target = target.clamp_min(torch.finfo(target.dtype).tiny).log()

    by_position = (target * (log_target - _log_probabilities(logits, temperature))).sum(-1)
    if align is None:
        return by_position
    return weight * by_position


def _log_probabilities(logits: Tensor, temperature: float) -> Tensor:
    """Return the log-probabilities of tokens at a temperature, fp32."""
    logits = logits.float()
    if temperature != 1:  # a division copies all logits
        logits = logits / temperature
    return logits.log_softmax(-1)
