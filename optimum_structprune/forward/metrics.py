"""How good a model is on held-out text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import exp
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from .divergence import divergence


if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

# The loss takes a second copy of the logits that it is given, so it is given few.
TOKENS_AT_ONCE = 128
PROBE_TOKENS = 8


def input_device(model: PreTrainedModel | PeftModel) -> torch.device:
    """Where a model takes its inputs. Weights that accelerate has offloaded lie on the meta device, and their inputs
    are fetched from the CPU.
    """
    device = torch.device(model.device)
    return torch.device("cpu") if device.type == "meta" else device


def run_model(model: PreTrainedModel, ids: Tensor, **more: Any):
    """One forward pass over a batch; an encoder-decoder model reads the same text on both sides.

    Args:
        model: Any model whose first argument is the batch.
        ids: Token ids, shape `(batch, seq_length)`, or what else the model takes.
        more: Other arguments of the model.
    """
    ids = ids.to(input_device(model))
    if model.config.is_encoder_decoder:
        return model(ids, decoder_input_ids=ids, use_cache=False, **more)
    if hasattr(model.config.get_text_config(), "use_cache"):
        return model(ids, use_cache=False, **more)
    return model(ids, **more)


def outputs_of(output) -> Tensor:
    """The tensor that a forward pass is about: logits where there are some, the last hidden state otherwise."""
    return output.logits if getattr(output, "logits", None) is not None else output[0]


@torch.no_grad()
def model_outputs(model: PreTrainedModel, samples: Tensor, batch_size: int = 4) -> Tensor:
    """The base model's last hidden states, whatever head sits on it, on the CPU: what `output_error` compares.

    Args:
        model: Any model; its training mode is left as it was.
        samples: Inputs, shape `(samples, ...)`.
        batch_size: Samples per forward pass.
    """
    base: Any = model.base_model
    with evaluating(model):
        outputs = (run_model(base, ids) for ids in samples.split(batch_size))
        # T5's classes have no base model inside them: logits it is.
        return torch.cat([getattr(output, "last_hidden_state", output[0]).float().cpu() for output in outputs])


def output_error(outputs: Tensor, dense: Tensor) -> float:
    """Mean squared distance to the dense model's outputs, relative to their variance over tokens."""
    spread = (dense - dense.flatten(0, -2).mean(0)).square().mean()
    return float((outputs - dense).square().mean() / spread)


@torch.no_grad()
def perplexity(model: PreTrainedModel | PeftModel, samples: Tensor, batch_size: int = 1) -> float:
    """Perplexity over token samples; each sample's first token is context only.

    Args:
        model: A causal language model; its training mode is left as it was.
        samples: Token ids, shape `(samples, seq_length)`.
        batch_size: Samples per forward pass; one at a time keeps the logits of a large vocabulary small.
    """
    with evaluating(model):
        loss = sum(_loss(logits, targets) for targets, logits in _predictions([model], samples, batch_size))
    return exp(loss / samples[:, 1:].numel())


@dataclass(frozen=True)
class Comparison:
    """What a model has in common with the dense one on the same text.

    Attributes:
        perplexity: Of the model.
        dense_perplexity: Of the dense model.
        divergence: Mean KL(dense‖model) per predicted token, in nats.
        agreement: Share of the predicted tokens for which both find the same one likeliest.
    """

    perplexity: float
    dense_perplexity: float
    divergence: float
    agreement: float


@torch.no_grad()
def compare(model: PreTrainedModel, dense: PreTrainedModel, samples: Tensor, batch_size: int = 1) -> Comparison:
    """Both perplexities, divergence and agreement in one pass of each model; see `perplexity`.

    What is held at a time is the logits and probabilities of 128 tokens by both models; where a model caps or scales
    its logits, those of one batch.

    Args:
        model: A causal language model; its training mode is left as it was.
        dense: Another one of the same vocabulary, possibly on another device.
        samples: Token ids, shape `(samples, seq_length)`.
        batch_size: Samples per forward pass.
    """
    totals = torch.zeros(4, dtype=torch.float64)
    with evaluating(model, dense):
        for targets, logits, theirs in _predictions([model, dense], samples, batch_size):
            apart = float(divergence(logits, theirs)) * len(targets)
            same = float((logits.argmax(-1) == theirs.argmax(-1)).sum())
            totals += torch.tensor([_loss(logits, targets), _loss(theirs, targets), apart, same])
    mine, dense_loss, apart, same = (totals / samples[:, 1:].numel()).tolist()
    return Comparison(exp(mine), exp(dense_loss), apart, same)


@contextmanager
def evaluating(*models: PreTrainedModel | PeftModel) -> Iterator[None]:
    """Models in eval mode for a while."""
    training = [model.training for model in models]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for model, mode in zip(models, training, strict=True):
            model.train(mode)


def _predictions(models: Sequence[Any], samples: Tensor, batch_size: int) -> Iterator[list[Tensor]]:
    """Targets, shape `(tokens,)`, and every model's logits for them, `(tokens, vocab)`, for few tokens at once."""
    plain = [_plain(model, samples[:1, :PROBE_TOKENS].to(input_device(model))) for model in models]
    for ids in samples.split(batch_size):
        targets = ids[:, 1:].flatten().split(TOKENS_AT_ONCE)
        logits = [_next_token_logits(model, ids, only) for model, only in zip(models, plain, strict=True)]
        for target, *some in zip(targets, *logits, strict=True):
            yield [tensor.to(some[0].device) for tensor in (target, *some)]


def _next_token_logits(model: Any, ids: Tensor, plain: bool) -> Iterator[Tensor]:
    """Logits for all tokens of a batch but the first of each row, for few tokens at once."""
    if not plain:
        yield from run_model(model, ids).logits[:, :-1].flatten(0, 1).split(TOKENS_AT_ONCE)
        return
    head = model.get_output_embeddings()
    for hidden in run_model(model.base_model, ids)[0][:, :-1].flatten(0, 1).split(TOKENS_AT_ONCE):
        yield head(hidden.to(head.weight.device))


def _plain(model: Any, ids: Tensor) -> bool:
    """Whether a model's logits are what its head makes of the base model's output, tried on a few tokens.

    So it is unless the model scales or caps them. Then the head need not run on all tokens at once, and the logits of
    a large vocabulary may take more memory than the model.
    """
    head, base = model.get_output_embeddings(), model.base_model
    if base is model or head is None or head.weight.is_meta or model.config.is_encoder_decoder:
        return False
    hidden = run_model(base, ids)[0]
    if hidden.shape[-1] != head.weight.shape[-1]:
        return False
    return torch.equal(head(hidden.to(head.weight.device)), run_model(model, ids).logits)


def _loss(logits: Tensor, targets: Tensor) -> float:
    return float(cross_entropy(logits.float(), targets, reduction="sum"))
