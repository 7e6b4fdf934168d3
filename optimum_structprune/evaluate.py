"""How good a model is on held-out text."""

from __future__ import annotations

from math import exp
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy


if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


@torch.no_grad()
def perplexity(model: PreTrainedModel | PeftModel, blocks: Tensor, batch_size: int = 4) -> float:
    """Perplexity over token blocks; each block's first token is context only.

    Args:
        model: A causal language model; its training mode is left as it was.
        blocks: Token ids, shape `(blocks, seq_length)`.
        batch_size: Blocks per forward pass.
    """
    training = model.training
    model.eval()
    loss, count = 0.0, 0
    for ids in blocks.split(batch_size):
        ids = ids.to(model.device)
        logits = model(ids, use_cache=False).logits[:, :-1]
        for row, target in zip(logits, ids[:, 1:], strict=True):
            loss += float(cross_entropy(row.float(), target.to(row.device), reduction="sum"))
            count += target.numel()
    model.train(training)
    return exp(loss / count)
