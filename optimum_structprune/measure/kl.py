"""The KL divergence of the next-token predictions of two models. Training, evaluation and searches use it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


# A function from the probabilities of a teacher, shape `(tokens, teacher vocab)`, and the errors of their entropies,
# shape `(tokens,)`. It returns a distribution over the tokens of the model, shape `(positions, vocab)`, and the error
# of the entropy and the weight of each position, both of shape `(positions,)`; see `TokenAlignment.next_part`.
Align = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
# The rest of a distribution that is smaller is rounding.
MIN_REST = 1e-6


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
        return aligned_divergence(logits, target, align, temperature)
    return (target * (log_target - _log_probabilities(logits, temperature))).sum(-1)


def aligned_divergence(
    logits: Tensor,
    probabilities: Tensor,
    align: Align,
    temperature: float = 1.0,
    negative_entropy: Tensor | None = None,
) -> Tensor:
    """Return the divergence of `divergence` for a model with other tokens.

    Args:
        logits: The logits of the model, shape `(positions, vocab)`.
        probabilities: The probabilities of the teacher at the temperature, shape `(tokens, teacher vocab)`.
        align: The alignment of the tokens.
        temperature: The temperature of both distributions.
        negative_entropy: The negative entropy of the teacher in nats, shape `(tokens,)`, if `probabilities` are
            estimated from samples. The entropy of samples is too small.

    Returns:
        The divergence of each position, shape `(positions,)`, fp32.
    """
    with torch.no_grad():
        error = probabilities.new_zeros(len(probabilities))
        if negative_entropy is not None:
            error = torch.xlogy(probabilities, probabilities).sum(-1) - negative_entropy
        target, aligned_error, weight = align(probabilities, error)
        # A token without any probability has the product 0, not NaN.
        log_target = target.clamp_min(torch.finfo(target.dtype).tiny).log()

    by_position = (target * (log_target - _log_probabilities(logits, temperature))).sum(-1)
    return weight * (by_position - aligned_error)


def estimated_divergence(
    logits: Tensor,
    ids: Tensor,
    probabilities: Tensor,
    negative_entropy: Tensor,
    temperature: float = 1.0,
    has_rest: bool = False,
) -> Tensor:
    """Return an estimate of the divergence of `divergence` from parts of the teacher's distribution.

    With stored tokens i of estimated probabilities p̂_i and the entropy H(p) of the whole distribution, it is

        KL = -H(p) - Σ_i p̂_i · log q_i

    With `has_rest`, the other tokens count as one token, of which the teacher's probability is 1 - Σ_i p̂_i, and the
    entropy counts them as one token too. This estimate is biased.

    Args:
        logits: The logits of the model, shape `(positions, vocab)`.
        ids: The stored tokens, shape `(positions, tokens)`.
        probabilities: Their estimated probabilities, of the same shape.
        negative_entropy: The negative entropy of the teacher in nats, shape `(positions,)`.
        temperature: The temperature of both distributions.
        has_rest: Whether the other tokens are one more token.

    Returns:
        The divergence of each position, shape `(positions,)`, fp32.
    """
    log_stored = _log_probabilities(logits, temperature).gather(1, ids)
    by_position = negative_entropy - (probabilities * log_stored).sum(-1)
    if not has_rest:
        return by_position

    rest = (1 - probabilities.sum(-1)).clamp(min=0)
    log_rest = torch.log1p(-log_stored.exp().sum(-1).clamp(max=1 - MIN_REST))
    return by_position - rest * log_rest


def _log_probabilities(logits: Tensor, temperature: float) -> Tensor:
    """Return the log-probabilities of tokens at a temperature, fp32."""
    logits = logits.float()
    if temperature != 1:  # a division copies all logits
        logits = logits / temperature
    return logits.log_softmax(-1)
