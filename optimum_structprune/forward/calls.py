"""How a model calls its layers, recorded so that they can be run one by one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..arch.load import layer_list
from ..arch.spec import ArchSpec
from ..errors import StructPruneError
from .hooks import StopForward, first_of, hidden_states_of, intercept
from .metrics import run_model


@dataclass(frozen=True)
class Call:
    """The arguments that the model calls one layer with, without the hidden states.

    Attributes:
        args: The positional arguments.
        kwargs: The arguments that are given by name.
        by_name: Whether the hidden states are given by name, as `hidden_states`, and not as the first argument.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    by_name: bool


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))


def equal(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors have the same shape and values; they may be on different devices."""
    return left is right or (left.shape == right.shape and torch.equal(left, right.to(left.device)))


def same_call(left: Call, right: Call) -> bool:
    """Whether two calls have the same tensors among their arguments."""
    pairs = list(zip(_tensors((left.args, left.kwargs)), _tensors((right.args, right.kwargs)), strict=True))
    return all(equal(a, b) for a, b in pairs)


class NotSequentialError(StructPruneError):
    """The model's layers cannot be run one by one."""


@torch.no_grad()
def capture(model: PreTrainedModel, arch: ArchSpec, ids: Tensor, whole: bool) -> tuple[Tensor, list[Call]]:
    """The hidden states that enter the first layer, and how the model calls its layers.

    The calls carry masks and rotary embeddings, which may differ by layer type. `ids` has the shape `(batch,
    seq_length)`.

    Returns:
        The hidden states, shape `(batch, seq_length, channels)`, and one call per layer that was recorded.
    """
    first: list[Tensor] = []
    calls: list[Call] = []
    outputs: list[Tensor] = []

    def before(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        by_name = "hidden_states" in kwargs
        hidden = hidden_states_of(args, kwargs)
        rest = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        if index and not equal(hidden, outputs[-1]):
            raise NotSequentialError(f"the model changes hidden states between layers {index - 1} and {index}")
        if not index:
            first.append(hidden)
        calls.append(Call(args if by_name else args[1:], rest, by_name))
        # What follows the last layer, such as the logits of a large vocabulary, may take more memory than all layers.
        if not whole or len(calls) == arch.num_layers:
            raise StopForward

    def after(index: int, output: Any) -> None:
        outputs[:] = [first_of(output)]

    with intercept(layer_list(model, arch), before, after):
        try:
            run_model(model, ids)
        except StopForward:
            pass
    return first[0], calls
