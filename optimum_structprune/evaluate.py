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

# The loss takes a second copy of the logits that it is given, so it is given few.
TOKENS_AT_ONCE = 128


@torch.no_grad()
def perplexity(model: PreTrainedModel | PeftModel, blocks: Tensor, batch_size: int = 1) -> float:
    """Perplexity over token blocks; each block's first token is context only.

    Args:
        model: A causal language model; its training mode is left as it was.
        blocks: Token ids, shape `(blocks, seq_length)`.
        batch_size: Blocks per forward pass; one at a time keeps the logits of a large vocabulary small.
    """
    training = model.training
    model.eval()
    loss, count = 0.0, 0
    for ids in blocks.split(batch_size):
        ids = ids.to(model.device)
        logits = model(ids, use_cache=False).logits[:, :-1].flatten(0, 1)
        targets = ids[:, 1:].flatten().to(logits.device)
        for some, target in zip(logits.split(TOKENS_AT_ONCE), targets.split(TOKENS_AT_ONCE), strict=True):
            loss += float(cross_entropy(some.float(), target, reduction="sum"))
        count += targets.numel()
    model.train(training)
    return exp(loss / count)
