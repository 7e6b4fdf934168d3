"""How a model calls its blocks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Call:
    """How the model calls one block, hidden states left out."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    by_name: bool


def first_of(output: Any) -> Tensor:
    """What a block hands on, of all that it returns."""
    return output[0] if isinstance(output, tuple) else output


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))


def equal(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors are the same, wherever they are."""
    return left is right or (left.shape == right.shape and torch.equal(left, right.to(left.device)))


def same_call(left: Call, right: Call) -> bool:
    """Whether two calls hand over the same tensors."""
    pairs = list(zip(_tensors((left.args, left.kwargs)), _tensors((right.args, right.kwargs)), strict=True))
    return all(equal(a, b) for a, b in pairs)
