"""Prefill and decoding with a cache of keys and values, and the size of the cache."""

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
    """Return the name of a model's argument for a cache of keys and values, or None if it has none."""
    parameters = signature(model.forward).parameters
    for name in ("cache", "past_key_values"):  # in newer and in older releases of transformers
        if name in parameters:
            return name
    return None


def last_logits_only(model: PreTrainedModel) -> bool:
    """Return whether a model can compute the logits of the last position alone, as generation does."""
    return "logits_to_keep" in signature(model.forward).parameters


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that end a text: those of the model, and that of the tokenizer."""
    ends = getattr(model.generation_config, "eos_token_id", None)
    if not isinstance(ends, list):
        ends = [ends]
    unique = dict.fromkeys([*ends, tokenizer.eos_token_id])
    return [end for end in unique if end is not None]


@torch.no_grad()
def continuations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    settings: Mapping[str, Any],
    listeners: Sequence[Callable[[Tensor, Tensor], Tensor]] = (),
) -> list[list[int]]:
    """Continue prompts up to the end token, which is left out.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        prompts: The token ids of each prompt.
        settings: Fields of `GenerationConfig`. The settings of the model itself are not used.
        listeners: Logits processors.

    Returns:
        The new token ids of each prompt.
    """
    ends = end_tokens(model, tokenizer)
    padding = tokenizer.pad_token_id
    if padding is None:
        padding = ends[0] if ends else 0
    longest = max(len(prompt) for prompt in prompts)
    ids, mask = [], []
    for prompt in prompts:
        gap = longest - len(prompt)
        ids.append([padding] * gap + list(prompt))
        mask.append([0] * gap + [1] * len(prompt))

    device = input_device(model)
    # A model may have more rows than its tokenizer has tokens.
    tokens = set(tokenizer.get_vocab().values())
    rows = range(model.config.get_text_config().vocab_size)
    without_token = [row for row in rows if row not in tokens]

    generation_config = GenerationConfig(**settings)
    generation_config.pad_token_id = padding
    generation_config.eos_token_id = ends or None
    generation_config.suppress_tokens = without_token or None
    generate: Any = model.generate
    # Transformers would take settings that are missing here from the model.
    own_config = model.generation_config
    model.generation_config = generation_config
    try:
        with in_fast_dtype(blocks(model)):
            output = generate(
                torch.tensor(ids, device=device),
                attention_mask=torch.tensor(mask, device=device),
                logits_processor=LogitsProcessorList(listeners),
            )
    finally:
        model.generation_config = own_config
    return [_up_to_end(text, ends) for text in output[:, longest:].tolist()]


def _up_to_end(text: list[int], ends: Sequence[int]) -> list[int]:
    """Return the tokens in front of the first end token."""
    for position, token in enumerate(text):
        if token in ends:
            return text[:position]
    return text


def sampled_continuations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float,
    seed: int,
) -> list[list[int]]:
    """Sample continuations of prompts up to the end token, which is part of the text.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        prompts: The token ids of each prompt.
        max_new_tokens: The largest number of new tokens.
        temperature: The temperature of the sampling.
        seed: The seed. A GPU draws other tokens than a CPU.
    """
    settings = {
        "do_sample": True,
        "temperature": temperature,
        "top_k": 0,
        "top_p": 1.0,
        "use_cache": True,
        "max_new_tokens": max_new_tokens,
    }
    device = input_device(model)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        texts = continuations(model, tokenizer, prompts, settings)

    ends = end_tokens(model, tokenizer)
    if not ends:
        return texts
    return [text + ends[:1] if len(text) < max_new_tokens else text for text in texts]


@torch.no_grad()
def read_prompt(model: PreTrainedModel, ids: Tensor, cache: Cache | None = None) -> tuple[Tensor, Cache]:
    """Run a model on a prompt, and return the most likely next token and the cache.

    Args:
        model: A causal language model.
        ids: The token ids, shape `(batch, prompt)`.
        cache: The cache of the tokens in front of them.

    Returns:
        The next tokens, shape `(batch, 1)`, and the cache of all tokens.
    """
    options: dict[str, Any] = {}
    if last_logits_only(model):
        options["logits_to_keep"] = 1
    name = cache_name(model)
    if cache is not None and name is not None:
        options[name] = cache
    output = model(input_ids=ids, use_cache=True, **options)
    return output.logits[:, -1:].argmax(-1), cache_of(output)


def write_tokens(model: PreTrainedModel, token: Tensor, cache: Cache, count: int) -> Tensor:
    """Decode `count` tokens greedily, also behind an EOS token, and return the last one, shape `(batch, 1)`."""
    for _ in range(count):
        token, cache = read_prompt(model, token, cache)
    return token


def cache_of(output: Mapping[str, Any]) -> Cache:
    """Return the cache in the output of a model; its field has another name in newer releases of transformers."""
    return next(value for value in output.values() if isinstance(value, Cache))


def growing_layers(cache: Cache) -> list[Any]:
    """Return the layers of a cache that keep keys and values, without those of a state of fixed size."""
    layers: list[Any] = getattr(cache, "self_attention_cache", cache).layers
    return [layer for layer in layers if getattr(layer, "keys", None) is not None]


@torch.no_grad()
def cached_values(model: PreTrainedModel, arch: ArchSpec) -> int | None:
    """Return the number of values that the cache keeps per token, by a run of one token.

    It is 0 for a model that does not generate, and None for one that cannot run on the meta device.
    """
    if not (arch.causal or model.config.is_encoder_decoder):
        return 0
    embedding = model.get_input_embeddings().get_parameter("weight")
    if embedding.device.type == "meta":
        # The attention masks of other implementations depend on values, which meta tensors do not have. The grouped
        # matrix product of experts takes bfloat16 only.
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
    """Return the bytes of keys and values in a cache."""
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in growing_layers(cache))
