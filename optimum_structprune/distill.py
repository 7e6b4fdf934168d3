"""How far a model is from its teacher. Tensors in, a number out."""

from __future__ import annotations

import torch
from torch import Tensor


def divergence(
    logits: Tensor, teacher: Tensor, temperature: float = 1.0, direction: str = "forward", top_k: int | None = None
) -> Tensor:
    """Mean Kullback-Leibler divergence per position, times temperature² (Hinton et al. 2015, section 2).

    Args:
        logits: The model's, shape `(..., vocab)`.
        teacher: The teacher's, of the same shape; no gradient flows into them.
        temperature: Divides both.
        direction: `forward` is KL(teacher‖model), `reverse` is KL(model‖teacher).
        top_k: Tell only the teacher's k likeliest tokens apart and take all others as one event. The result is a lower
            bound of the full divergence.
    """
    mine, theirs = (_log_probabilities(values, temperature) for values in (logits, teacher.detach()))
    if top_k is not None and top_k < teacher.shape[-1]:
        best = teacher.topk(top_k, dim=-1).indices
        mine, theirs = _with_rest(mine.gather(-1, best)), _with_rest(theirs.gather(-1, best))
    p, q = (theirs, mine) if direction == "forward" else (mine, theirs)
    return (p.exp() * (p - q)).sum(-1).mean() * temperature**2


def _log_probabilities(logits: Tensor, temperature: float) -> Tensor:
    return torch.log_softmax(logits.float() / temperature, dim=-1)


def _with_rest(chosen: Tensor) -> Tensor:
    # The floor keeps the logarithm finite where the chosen tokens hold all the probability that fp32 can tell from 1.
    rest = (1 - chosen.exp().sum(-1, keepdim=True)).clamp(min=torch.finfo(chosen.dtype).eps)
    return torch.cat([chosen, rest.log()], dim=-1)
