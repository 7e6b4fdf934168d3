"""Reading a prompt and writing tokens one at a time with a cache of keys and values, and its size."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, GenerationConfig, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase

from ..arch.hooks import in_fast_dtype
from ..arch.modules import blocks
from ..arch.spec import ArchSpec
from ..method.layers import input_device


def cache_name(model: PreTrainedModel) -> str | None:
    """The name of a model's argument for a cache of keys and values, or None."""
    names = ("cache", "past_key_values")  # in newer and in older releases of transformers
    return next((name for name in names if name in signature(model.forward).parameters), None)


def last_logits_only(model: PreTrainedModel) -> bool:
    """Tells if a model can compute the logits of the last position alone, as generation asks it to."""
    return "logits_to_keep" in signature(model.forward).parameters


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a text: those of the model, and that of the tokenizer."""
    given = getattr(model.generation_config, "eos_token_id", None)
    ends = [*(given if isinstance(given, list) else [given]), tokenizer.eos_token_id]
    return [end for end in dict.fromkeys(ends) if end is not None]


@torch.no_grad()
def continuations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    settings: Mapping[str, Any],
    listeners: Sequence[Callable[[Tensor, Tensor], Tensor]] = (),
) -> list[list[int]]:
    """Continues prompts of token ids, by these settings alone, up to the end token."""
    longest, ends, device = max(map(len, prompts)), end_tokens(model, tokenizer), input_device(model)
    padding = next((token for token in (tokenizer.pad_token_id, *ends) if token is not None), 0)
    ids = torch.tensor([[padding] * (longest - len(prompt)) + [*prompt] for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    settings = {**settings, "pad_token_id": padding, "eos_token_id": ends or None}
    generate: Any = model.generate
    # Transformers would fill gaps in what it is given from the model's own settings.
    former, model.generation_config = model.generation_config, GenerationConfig(**settings)
    try:
        with in_fast_dtype(blocks(model)):
            output = generate(ids, attention_mask=mask, logits_processor=LogitsProcessorList(listeners))
    finally:
        model.generation_config = former
    texts = output[:, longest:].tolist()
    return [text[: min((text.index(end) for end in ends if end in text), default=len(text))] for text in texts]


def sampled_continuations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float,
    seed: int,
) -> list[list[int]]:
    """Continues prompts of token ids at random, up to the end token, which is part of the text."""
    drawn = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0, "use_cache": True}
    device = input_device(model)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        texts = continuations(model, tokenizer, prompts, {**drawn, "max_new_tokens": max_new_tokens})
    ends = end_tokens(model, tokenizer)[:1]
    return [text + ends * (len(text) < max_new_tokens) for text in texts]


@torch.no_grad()
def read_prompt(model: PreTrainedModel, ids: Tensor, cache: Cache | None = None) -> tuple[Tensor, Cache]:
    """Reads a prompt, `(batch, prompt)`; gives the likeliest next tokens, `(batch, 1)`, and the cache."""
    more: dict[str, Any] = {"logits_to_keep": 1} if last_logits_only(model) else {}
    if cache is not None and (name := cache_name(model)) is not None:
        more[name] = cache
    output = model(input_ids=ids, use_cache=True, **more)
    return output.logits[:, -1:].argmax(-1), cache_of(output)


def write_tokens(model: PreTrainedModel, token: Tensor, cache: Cache, count: int) -> Tensor:
    """Write `count` tokens, the likeliest each time, and return the last, shape `(batch, 1)`; EOS does not end it."""
    for _ in range(count):
        token, cache = read_prompt(model, token, cache)
    return token


def cache_of(output: Mapping[str, Any]) -> Cache:
    """The cache in the output of a model, whose field has another name in newer releases of transformers."""
    return next(value for value in output.values() if isinstance(value, Cache))


def growing_layers(cache: Cache) -> list[Any]:
    """Gives the layers of a cache that keep keys and values, and no state of a fixed size."""
    layers: list[Any] = getattr(cache, "self_attention_cache", cache).layers
    return [layer for layer in layers if getattr(layer, "keys", None) is not None]


@torch.no_grad()
def cached_values(model: PreTrainedModel, arch: ArchSpec) -> int | None:
    """The number of values that generation keeps per token, read off the cache of a run of one token: 0 for a model
    that does not generate, and None for one that cannot be run on the meta device.
    """
    if not (arch.causal or model.config.is_encoder_decoder):
        return 0
    embedding = model.get_input_embeddings().get_parameter("weight")
    if embedding.device.type == "meta":
        # The attention masks of other implementations depend on values, which tensors without memory do not have, and
        # the matrix product that runs experts takes these in this precision only.
        model = deepcopy(model)
        model.set_attn_implementation("eager")
        model.eval().to(torch.bfloat16)  # type: ignore[arg-type]
    token = torch.zeros(1, 1, embedding.shape[1], dtype=model.dtype, device=embedding.device)
    try:
        output = model.get_decoder()(inputs_embeds=token, use_cache=True)
    except (RuntimeError, TypeError):
        return None
    return sum(layer.keys.numel() + layer.values.numel() for layer in growing_layers(cache_of(output)))


def cache_bytes(cache: Cache) -> int:
    """The bytes of keys and values in a cache."""
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in growing_layers(cache))
