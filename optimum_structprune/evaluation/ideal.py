"""What a model computes and reads, counted from its parameters: the speed-up that smaller matrices could give."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from ..arch.load import describe
from ..errors import StructPruneError
from ..forward.generation import (
    bytes_of,
    growing_layers,
    last_logits_only,
    read_parameters,
    read_prompt,
    why_not_counted,
)
from ..forward.metrics import input_device


@dataclass(frozen=True)
class CachedLayer:
    """What one layer keeps of a token.

    Attributes:
        values: The number of keys and values per token.
        bytes: The same in bytes.
        window: The number of tokens that it looks back at most; None where there is no limit.
    """

    values: int
    bytes: int
    window: int | None

    def seen(self, first: int, last: int) -> int:
        """The number of tokens that the tokens number `first` to `last` look at in all, each itself included."""
        return sum(position if self.window is None else min(position, self.window) for position in range(first, last))


@dataclass(frozen=True)
class Work:
    """What a causal language model has to compute and to read, whatever runs it.

    Attributes:
        matrices: The number of parameters in the matrices of the decoder, without embeddings that are looked up.
        head: The number of parameters in the output head, tied or not.
        read: The bytes of all parameters that each token reads: matrices, head, norms and biases.
        layers: What the layers cache, for those that keep keys and values.
        groups: The number of query heads per KV head.
        last_only: Whether a prompt costs the logits of its last position only.
    """

    matrices: int
    head: int
    read: int
    layers: tuple[CachedLayer, ...]
    groups: int
    last_only: bool

    @property
    def cache_per_token(self) -> int:
        """The bytes of keys and values per token, over all layers."""
        return sum(layer.bytes for layer in self.layers)

    def cache(self, tokens: int) -> int:
        """The bytes of keys and values of a sequence of so many tokens."""
        return sum(layer.bytes * min(tokens, layer.window or tokens) for layer in self.layers)

    def prompt_flops(self, prompt: int) -> int:
        """The floating-point operations for one prompt.

        They are two per parameter of a matrix and token, two per parameter of the head and position whose logits are
        computed, and in each layer two per cached value, query head of its group and token that a token looks at.
        """
        head = self.head * (1 if self.last_only else prompt)
        attention = self.groups * sum(layer.values * layer.seen(1, prompt + 1) for layer in self.layers)
        return 2 * (self.matrices * prompt + head + attention)

    def decode_bytes(self, batch_size: int, prompt: int, count: int) -> int:
        """The bytes read to write `count` tokens after prompts: all parameters once per step, and the cache."""
        seen = sum(layer.bytes * layer.seen(prompt + 1, prompt + count + 1) for layer in self.layers)
        return count * self.read + batch_size * seen


def work_of(model: PreTrainedModel) -> Work:
    """Count the work of a causal language model from its parameters, and from the cache of one token."""
    head, parameters = model.get_output_embeddings().weight.numel(), read_parameters(model)
    _, cache = read_prompt(model, torch.zeros(1, 1, dtype=torch.long, device=input_device(model)))
    layers = (
        CachedLayer(
            layer.keys.numel() + layer.values.numel(),
            bytes_of([layer.keys, layer.values]),
            getattr(layer, "sliding_window", None),
        )
        for layer in growing_layers(cache)
    )
    # transformers' own name for the number of query heads to a KV head, which pruning of KV groups keeps.
    groups = (getattr(module, "num_key_value_groups", None) for module in model.modules())
    return Work(
        matrices=sum(parameter.numel() for parameter in parameters if parameter.ndim > 1) - head,
        head=head,
        read=bytes_of(parameters),
        layers=tuple(layers),
        groups=next((group for group in groups if isinstance(group, int)), 1),
        last_only=last_logits_only(model),
    )


def why_not_ideal(model: PreTrainedModel, arch_file: str | Path | None = None) -> str | None:
    """The reason why the parameters of a model do not say what a token costs; None where they do."""
    try:
        arch = describe(model, arch_file)
    except StructPruneError:
        return f"a {model.config.model_type} model is not described, so it may have parts that few tokens use"
    return why_not_counted(model, arch) or None
