"""Compute a loss of logits in chunks of tokens, so that the logits of a batch are never in memory at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint


# Bytes of one chunk of logits in fp32. The loss of a chunk takes about five times this memory.
CHUNK_BYTES = {"cpu": 2**25, "gpu": 2**27}
MIN_CHUNK_TOKENS = 64


class TokenLosses(NamedTuple):
    """The values of a loss by token, each of shape `(tokens,)`, fp32.

    Attributes:
        loss: The value to minimise.
        kl: The KL divergence in nats, without a gradient.
    """

    loss: Tensor
    kl: Tensor


# A function that computes the losses of the tokens `start` to `end` from their inputs, `(end - start, features)`.
ChunkLoss = Callable[[Tensor, int, int], TokenLosses]


def device_kind(device: torch.device) -> str:
    """Return the key of the defaults for a device, `cpu` or `gpu`."""
    if device.type == "cpu":
        return "cpu"
    return "gpu"


def chunk_tokens(vocab_size: int, device: torch.device) -> int:
    """Return the number of tokens in a chunk for a vocabulary of this size."""
    chunk_bytes = CHUNK_BYTES[device_kind(device)]
    return max(MIN_CHUNK_TOKENS, chunk_bytes // (4 * vocab_size))


def chunked_losses(inputs: Tensor, chunk_loss: ChunkLoss, size: int, trains_head: bool) -> TokenLosses:
    """Compute the losses of tokens, `size` of them at a time.

    The loss of a token depends only on the token's own input. So the gradient of each input is computed together with
    the loss, and only the gradients of the inputs are stored. If `chunk_loss` uses trainable weights, their gradients
    need the logits again, and the backward pass recomputes them chunk by chunk.

    Args:
        inputs: Hidden states or logits, shape `(tokens, features)`.
        chunk_loss: A function that computes the losses of a chunk.
        size: The number of tokens in a chunk.
        trains_head: Whether `chunk_loss` uses trainable weights.
    """
    if not torch.is_grad_enabled() or not (inputs.requires_grad or trains_head):
        return _joined([chunk_loss(inputs[start:end], start, end) for start, end in _chunks(len(inputs), size)])

    if not trains_head:
        loss, kl = _LossWithGradient.apply(inputs, chunk_loss, size)
        return TokenLosses(loss, kl)

    losses = []
    for start, end in _chunks(len(inputs), size):
        values: Any = checkpoint(chunk_loss, inputs[start:end], start, end, use_reentrant=False)
        losses.append(values)
    return _joined(losses)


def _chunks(count: int, size: int) -> list[tuple[int, int]]:
    """Return the start and the end of each chunk. Without tokens, return one empty chunk."""
    starts = range(0, max(count, 1), size)
    return [(start, min(start + size, count)) for start in starts]


def _joined(losses: list[TokenLosses]) -> TokenLosses:
    loss = torch.cat([chunk.loss for chunk in losses])
    kl = torch.cat([chunk.kl for chunk in losses])
    return TokenLosses(loss, kl)


class _LossWithGradient(torch.autograd.Function):
    """Compute losses and the gradients of the inputs in one pass over the chunks."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, chunk_loss: ChunkLoss, size: int) -> tuple[Tensor, Tensor]:
        """Return the loss and the KL divergence of each token."""
        losses = []
        gradients = torch.empty_like(inputs)
        for start, end in _chunks(len(inputs), size):
            chunk = inputs[start:end].detach().requires_grad_()
            with torch.enable_grad():
                values = chunk_loss(chunk, start, end)
                total = values.loss.sum()

            (gradients[start:end],) = torch.autograd.grad(total, chunk)
            losses.append(TokenLosses(values.loss.detach(), values.kl.detach()))

        ctx.save_for_backward(gradients)
        loss, kl = _joined(losses)
        ctx.mark_non_differentiable(kl)
        return loss, kl

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, loss_gradient: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
        """Return the gradient of the inputs."""
        (gradients,) = ctx.saved_tensors
        return gradients * loss_gradient[:, None].to(gradients.dtype), None, None
