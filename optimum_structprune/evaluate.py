"""How good a model is on held-out text."""

from __future__ import annotations

from math import exp
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy


if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

# The loss takes a second copy of the logits that it is given, so it is given few.
TOKENS_AT_ONCE = 128


def input_device(model: PreTrainedModel | PeftModel) -> torch.device:
    """Where a model takes its inputs. Weights that accelerate has offloaded lie on the meta device, and their inputs
    are fetched from the CPU.
    """
    device = torch.device(model.device)
    return torch.device("cpu") if device.type == "meta" else device


def run_model(model: PreTrainedModel, ids: Tensor):
    """One forward pass over a batch; an encoder-decoder model reads the same text on both sides.

    Args:
        model: Any model whose first argument is the batch.
        ids: Token ids, shape `(batch, seq_length)`, or what else the model takes.
    """
    ids = ids.to(input_device(model))
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
    for ids in blocks.split(batch_size):
        ids = ids.to(input_device(model))
        logits = model(ids, use_cache=False).logits[:, :-1].flatten(0, 1)
        targets = ids[:, 1:].flatten().to(logits.device)
        for some, target in zip(logits.split(TOKENS_AT_ONCE), targets.split(TOKENS_AT_ONCE), strict=True):
            loss += float(cross_entropy(some.float(), target, reduction="sum"))
        count += targets.numel()
    model.train(training)
    return exp(loss / count)
