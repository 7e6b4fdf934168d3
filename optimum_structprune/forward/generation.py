"""Reading a prompt and writing tokens one at a time, with the cache of keys and values between the two."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel


# What `forward` calls the cache, in newer and in older releases of transformers.
CACHE_NAMES = ("cache", "past_key_values")


def cache_name(model: PreTrainedModel) -> str | None:
    """The argument in which a model takes a cache of keys and values; None for a model that takes none."""
    return next((name for name in CACHE_NAMES if name in signature(model.forward).parameters), None)


def last_logits_only(model: PreTrainedModel) -> bool:
    """Whether a model can compute the logits of the last position alone, as generation asks it to."""
    return "logits_to_keep" in signature(model.forward).parameters


@torch.no_grad()
def read_prompt(model: PreTrainedModel, ids: Tensor) -> tuple[Tensor, Cache]:
    """Run a prompt through a causal language model, as generation does before its first token. `ids` has the shape
    `(batch, prompt)`.

    Returns:
        The likeliest next tokens, shape `(batch, 1)`, and the cache, which holds the prompt.
    """
    return _step(model, ids, None)


@torch.no_grad()
def write_tokens(model: PreTrainedModel, token: Tensor, cache: Cache, count: int) -> Tensor:
    """Write so many tokens, the likeliest each time, whatever they are: an EOS token does not end it. `token` has the
    shape `(batch, 1)`.

    Returns:
        The last tokens, shape `(batch, 1)`.
    """
    for _ in range(count):
        token, cache = _step(model, token, cache)
    return token


def _step(model: PreTrainedModel, ids: Tensor, cache: Cache | None) -> tuple[Tensor, Cache]:
    more: dict[str, Any] = {"logits_to_keep": 1} if last_logits_only(model) else {}
    if cache is not None and (name := cache_name(model)) is not None:
        more[name] = cache
    output = model(input_ids=ids, use_cache=True, **more)
    return output.logits[:, -1:].argmax(-1), cache_of(output)


def cache_of(output: Mapping[str, Any]) -> Cache:
    """The cache in the output of a model, whose field has another name in newer releases of transformers."""
    return next(value for value in output.values() if isinstance(value, Cache))


def growing_layers(cache: Cache) -> list[Any]:
    """The layers of a cache that keep keys and values.

    Linear attention, state-space mixers and short convolutions hold a state whose size no number of tokens changes.
    """
    layers: list[Any] = getattr(cache, "self_attention_cache", cache).layers
    return [layer for layer in layers if getattr(layer, "keys", None) is not None]
