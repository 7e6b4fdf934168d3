"""How far a model is from its teacher. Tensors in, a number out."""

from __future__ import annotations

import torch
from torch import Tensor


def divergence(logits: Tensor, teacher: Tensor, temperature: float = 1.0, top_k: int | None = None) -> Tensor:
    """Mean divergence KL(teacher‖model) per position, times temperature² (Hinton et al. 2015, section 2). `logits` has
    the shape `(..., vocab)`.

    Returns:
        A scalar in nats, fp32.
    """
    if top_k is not None and top_k < teacher.shape[-1]:
        return divergence_from_likeliest(logits, *likeliest(teacher, top_k, temperature), temperature)
    mine, theirs = (_log_probabilities(values, temperature) for values in (logits, teacher.detach()))
    return _mean_divergence(mine, theirs) * temperature**2


def likeliest(teacher: Tensor, top_k: int, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """The teacher's likeliest tokens, shape `(..., k)`, and their log-probabilities, the same shape in fp32. `teacher`
    has the shape `(..., vocab)`.
    """
    log_probabilities, tokens = _log_probabilities(teacher.detach(), temperature).topk(top_k, dim=-1)
    return tokens, log_probabilities


def divergence_from_likeliest(
    logits: Tensor,
    tokens: Tensor,
    log_probabilities: Tensor,
    temperature: float = 1.0,
) -> Tensor:
    """The same as `divergence` with `top_k`, from what `likeliest` gave at the same temperature. `logits` has the
    shape `(..., vocab)`, `tokens` `(..., k)`.
    """
    mine = _log_probabilities(logits, temperature).gather(-1, tokens)
    return _mean_divergence(_with_rest(mine), _with_rest(log_probabilities)) * temperature**2


def _mean_divergence(mine: Tensor, theirs: Tensor) -> Tensor:
    return (theirs.exp() * (theirs - mine)).sum(-1).mean()


def _log_probabilities(logits: Tensor, temperature: float) -> Tensor:
    return torch.log_softmax(logits.float() / temperature, dim=-1)


def _with_rest(chosen: Tensor) -> Tensor:
    # The floor keeps the logarithm finite where the chosen tokens hold all the probability that fp32 can tell from 1.
    rest = (1 - chosen.exp().sum(-1, keepdim=True)).clamp(min=torch.finfo(chosen.dtype).eps)
    return torch.cat([chosen, rest.log()], dim=-1)
