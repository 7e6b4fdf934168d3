"""How good a model is on held-out text."""

from __future__ import annotations

from collections.abc import Iterator
from math import exp
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy


if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

# A vocabulary is large: the logits of a whole block may take more memory than the model's blocks.
TOKENS_AT_ONCE = 128
PROBE_TOKENS = 8


def run_model(model: PreTrainedModel, ids: Tensor):
    """One forward pass over a batch; an encoder-decoder model reads the same text on both sides.

    Args:
        model: Any model whose first argument is the batch.
        ids: Token ids, shape `(batch, seq_length)`, or what else the model takes.
    """
    ids = ids.to(model.device)
    if model.config.is_encoder_decoder:
        return model(ids, decoder_input_ids=ids, use_cache=False)
    if hasattr(model.config.get_text_config(), "use_cache"):
        return model(ids, use_cache=False)
    return model(ids)


def outputs_of(output) -> Tensor:
    """The tensor that a forward pass is about: logits where there are some, the last hidden state otherwise."""
    return output.logits if getattr(output, "logits", None) is not None else output[0]


@torch.no_grad()
def model_outputs(model: PreTrainedModel, blocks: Tensor, batch_size: int = 4) -> Tensor:
    """The base model's last hidden states, whatever head sits on it, on the CPU: what `output_error` compares.

    Args:
        model: Any model; its training mode is left as it was.
        blocks: Inputs, shape `(blocks, ...)`.
        batch_size: Blocks per forward pass.
    """
    training = model.training
    model.eval()
    base: Any = model.base_model
    outputs = (run_model(base, ids) for ids in blocks.split(batch_size))
    # T5's classes have no base model inside them: logits it is.
    found = [getattr(output, "last_hidden_state", output[0]).float().cpu() for output in outputs]
    model.train(training)
    return torch.cat(found)


def output_error(outputs: Tensor, dense: Tensor) -> float:
    """Mean squared distance to the dense model's outputs, relative to their variance over tokens."""
    spread = (dense - dense.flatten(0, -2).mean(0)).square().mean()
    return float((outputs - dense).square().mean() / spread)


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
    for logits, target in next_token_logits(model, blocks, batch_size):
        loss += float(cross_entropy(logits, target, reduction="sum"))
        count += len(target)
    model.train(training)
    return exp(loss / count)


def next_token_logits(
    model: PreTrainedModel | PeftModel, blocks: Tensor, batch_size: int = 1
) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits, a few tokens at a time, and the tokens that they are to predict: all but each block's first.

    Where the head is no more than a matrix, only so many logits exist at once; where the model changes them further
    (soft caps, scales), those of a batch are made together.

    Args:
        model: A causal language model, in evaluation mode.
        blocks: Token ids, shape `(blocks, seq_length)`.
        batch_size: Blocks per forward pass.

    Yields:
        Logits in fp32, shape `(n, vocabulary)`, and token ids, shape `(n,)`, with n up to `TOKENS_AT_ONCE`.
    """
    head = model.get_output_embeddings()
    plain = _plain(model, blocks[:1, :PROBE_TOKENS].to(model.device))
    for ids in blocks.split(batch_size):
        ids = ids.to(model.device)
        output = (model.base_model if plain else model)(ids, use_cache=False)
        parts = output[0][:, :-1].flatten(0, 1).split(TOKENS_AT_ONCE)
        for part, target in zip(parts, ids[:, 1:].flatten().split(TOKENS_AT_ONCE), strict=True):
            logits = head(part.to(head.weight.device)) if plain else part
            yield logits.float(), target.to(logits.device)


def _plain(model: PreTrainedModel | PeftModel, ids: Tensor) -> bool:
    """Whether a model's logits are what its head makes of the base model's output, tried on a few tokens."""
    head, base = model.get_output_embeddings(), model.base_model
    if base is model or head is None:
        return False
    hidden = base(ids, use_cache=False)[0]
    if hidden.shape[-1] != head.weight.shape[-1]:
        return False
    return torch.equal(head(hidden.to(head.weight.device)), model(ids, use_cache=False).logits)
