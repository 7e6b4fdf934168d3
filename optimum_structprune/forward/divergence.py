"""How far a model is from its teacher. Tensors in, a number out."""

from __future__ import annotations

import torch
from torch import Tensor


def divergence(logits: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Mean divergence KL(teacher‖model) per position in nats, fp32, times temperature² (Hinton et al. 2015, section
    2); both logits have the shape `(..., vocab)`.
    """
    mine, taught = (torch.log_softmax(values.float() / temperature, dim=-1) for values in (logits, teacher.detach()))
    return (taught.exp() * (taught - mine)).sum(-1).mean() * temperature**2
