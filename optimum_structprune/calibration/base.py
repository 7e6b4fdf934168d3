"""What gives moments: the interface of all passes over calibration samples."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..arch.spec import Space
from .moments import Moments


@dataclass(frozen=True)
class PassesState:
    """What passes over the samples have reached.

    Attributes:
        tensors: Hidden states, by name.
        values: Numbers that were measured in earlier layers, as JSON takes them.
    """

    tensors: dict[str, Tensor]
    values: dict[str, Any]


class Passes(ABC):
    """Forward passes over the calibration samples, asked for by one layer of the model after the other.

    A subclass that runs nothing between layers leaves `advance`, `advance_dense`, `state` and `resume_` as they are.
    """

    @abstractmethod
    def gather(self, layer: int, space: Space, gram: bool) -> Iterator[list[Moments]]:
        """Moments of the inputs of the space's consumers: one per consumer, of one domain after the other.

        A Gram matrix of a large model takes gigabytes, so those of a domain are to be let go before the next is asked
        for.
        """

    @abstractmethod
    def contributions(self, layer: int, space: Space) -> Tensor:
        """How much each expert of a space of whole experts contributes, shape `(domains, experts)`."""

    def advance_dense(self, layer: int, kinds: Collection[str]) -> None:
        """Take the dense residual stream through a layer that has its dense weights."""
        return

    def advance(self, layer: int) -> None:
        """Go on to the next layer; `layer` has its final weights for this step."""
        return

    def state(self) -> PassesState | None:
        """What the passes have reached; None where they cannot go on at a layer."""
        return None

    def resume_(self, state: PassesState) -> None:
        """Go on from what other passes over the same samples have reached."""
        return
