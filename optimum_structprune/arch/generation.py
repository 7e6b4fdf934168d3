"""Generate text, run prefill and decoding with a cache of keys and values, and measure the cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, GenerationConfig, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase

from ..system.errors import StructPruneError
from ..system.stages import progress
from .hooks import in_fast_dtype
from .inference import input_device
from .modules import blocks
from .spec import ArchSpec


def cache_name(model: PreTrainedModel) -> str | None:
    """Return the name of a model's argument for a cache of keys and values, or None if it does not have one."""
    parameters = signature(model.forward).parameters

    # The name depends on the release of transformers.
    for name in ("cache", "past_key_values"):
        if name in parameters:
            return name
    return None


def last_logits_only(model: PreTrainedModel) -> bool:
    """Return whether a model can compute the logits of the last position alone, as generation does."""
    return "logits_to_keep" in signature(model.forward).parameters


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the EOS tokens of the model and of the tokenizer."""
    eos_ids = getattr(model.generation_config, "eos_token_id", None)
    if not isinstance(eos_ids, list):
        eos_ids = [eos_ids]

    # A dictionary keeps the order and removes repetitions.
    unique_ids = dict.fromkeys(eos_ids)
    unique_ids.setdefault(tokenizer.eos_token_id)
    return [eos_id for eos_id in unique_ids if eos_id is not None]


@torch.no_grad()
def continuations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    settings: Mapping[str, Any],
    label: str = "",
    listeners: Sequence[Callable[[Tensor, Tensor], Tensor]] = (),
) -> list[list[int]]:
    """Continue prompts up to an EOS token, which is not part of the result.

    Args:
        model: A causal language model.
        tokenizer: The tokenizer of the model.
        prompts: The token ids of each prompt.
        settings: Fields of `GenerationConfig`. The settings of the model itself are not used.
        label: The label of the progress bar; by default the announcement of the stage.
        listeners: Logits processors.

    Returns:
        The new token ids of each prompt.
    """
    eos_ids = end_tokens(model, tokenizer)
    padding_id = tokenizer.pad_token_id
    if padding_id is None:
        padding_id = 0
        if eos_ids:
            padding_id = eos_ids[0]

    prompt_length = max(len(prompt) for prompt in prompts)
    ids = []
    mask = []
    for prompt in prompts:
        num_padding = prompt_length - len(prompt)
        ids.append([padding_id] * num_padding + list(prompt))
        mask.append([0] * num_padding + [1] * len(prompt))

    generation_config = GenerationConfig(**settings)
    generation_config.pad_token_id = padding_id
    generation_config.eos_token_id = eos_ids or None
    generation_config.suppress_tokens = _rows_without_token(model, tokenizer) or None

    bar = progress(range(settings["max_new_tokens"]), desc=label, unit="token", leave=False)

    def advance(_: Tensor, scores: Tensor) -> Tensor:
        next(bar, None)
        if scores.isnan().any():
            raise StructPruneError(
                f"The {type(model).__name__} computes NaN for the next token. Load it in float32 or bfloat16, and "
                "check its weights."
            )
        return scores

    device = input_device(model)
    generate: Any = model.generate
    with _generating_with(model, generation_config), in_fast_dtype(blocks(model)):
        output = generate(
            torch.tensor(ids, device=device),
            attention_mask=torch.tensor(mask, device=device),
            logits_processor=LogitsProcessorList([*listeners, advance]),
        )
    return [_up_to_end(text, eos_ids) for text in output[:, prompt_length:].tolist()]


def _rows_without_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the rows of the embedding that do not belong to a token. Some models have such rows."""
    token_ids = set(tokenizer.get_vocab().values())
    num_rows = model.config.get_text_config().vocab_size
    return [row for row in range(num_rows) if row not in token_ids]


@contextmanager
def _generating_with(model: PreTrainedModel, generation_config: GenerationConfig) -> Iterator[None]:
    """Replace the generation config of a model inside `with`.

    Otherwise transformers would take fields that `generation_config` does not set from the config of the model.
    """
    original_config = model.generation_config
    model.generation_config = generation_config
    try:
        yield
    finally:
        model.generation_config = original_config


def _up_to_end(text: list[int], eos_ids: Sequence[int]) -> list[int]:
    """Return the tokens before the first EOS token."""
    for position, token in enumerate(text):
        if token in eos_ids:
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
    """Sample continuations of prompts up to an EOS token, which is part of the result.

    Args:
        model: A causal language model.
        tokenizer: The tokenizer of the model.
        prompts: The token ids of each prompt.
        max_new_tokens: The maximum number of new tokens.
        temperature: The sampling temperature.
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
    devices = []
    if device.type == "cuda":
        devices.append(device)
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        texts = continuations(model, tokenizer, prompts, settings, f"Generating {len(prompts)} answers")

    # A text with fewer tokens than the maximum has ended with an EOS token.
    eos_ids = end_tokens(model, tokenizer)
    for text in texts:
        if eos_ids and len(text) < max_new_tokens:
            text.append(eos_ids[0])
    return texts


@torch.no_grad()
def read_prompt(model: PreTrainedModel, ids: Tensor, cache: Cache | None = None) -> tuple[Tensor, Cache]:
    """Run a model on a prompt, and return the most likely next token and the cache.

    Args:
        model: A causal language model.
        ids: The token ids, shape `(batch, prompt)`.
        cache: The cache of the previous tokens.

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
    """Decode `count` tokens greedily, also after an EOS token, and return the last one, shape `(batch, 1)`."""
    for _ in range(count):
        token, cache = read_prompt(model, token, cache)
    return token


def cache_of(output: Mapping[str, Any]) -> Cache:
    """Return the cache in the output of a model. The name of its field depends on the release of transformers."""
    return next(value for value in output.values() if isinstance(value, Cache))


def growing_layers(cache: Cache) -> list[Any]:
    """Return the layers of a cache that store keys and values. Layers with a state of fixed size are left out."""
    layers: list[Any] = getattr(cache, "self_attention_cache", cache).layers
    return [layer for layer in layers if getattr(layer, "keys", None) is not None]


@torch.no_grad()
def cached_values(model: PreTrainedModel, arch: ArchSpec) -> int | None:
    """Return the number of values per token in the cache, by running one token.

    Returns:
        The number of values. It is 0 for a model that does not generate, and None for a model that cannot run on the
        meta device.
    """
    if not (arch.causal or model.config.is_encoder_decoder):
        return 0

    embedding = model.get_input_embeddings().get_parameter("weight")
    if embedding.device.type == "meta":
        # The attention masks of other implementations depend on values, which meta tensors do not have. The grouped
        # matrix product of experts accepts bfloat16 only.
        model = deepcopy(model)
        model.set_attn_implementation("eager")
        model.eval().to(torch.bfloat16)  # type: ignore[arg-type]

    token = torch.zeros(1, 1, embedding.shape[1], dtype=model.dtype, device=embedding.device)
    try:
        output = model.get_decoder()(inputs_embeds=token, use_cache=True)
    except (RuntimeError, TypeError):
        return None

    layers = growing_layers(cache_of(output))
    return sum(layer.keys.numel() + layer.values.numel() for layer in layers)


def cache_bytes(cache: Cache) -> int:
    """Return the bytes of keys and values in a cache."""
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in growing_layers(cache))
