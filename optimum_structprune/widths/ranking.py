"""One ranking of all units of a model, and how far down it a budget reaches."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..arch.spec import ArchSpec, Space


@dataclass
class Ladder:
    """The widths that one kind of space may take in one layer, from the widest down.

    Attributes:
        name: Kind of space.
        layer: Index of the layer.
        widths: Descending; the first is where it starts.
        scores: Of its units, ascending, one for each unit of width.
        unit_params: Parameters that go with one unit of width.
        at: Index of the present width.
    """

    name: str
    layer: int
    widths: Sequence[int]
    scores: Sequence[float]
    unit_params: int
    at: int = field(default=0)

    @property
    def width(self) -> int:
        """The present width."""
        return self.widths[self.at]

    @property
    def low(self) -> bool:
        """Whether there is no step left."""
        return self.at + 1 == len(self.widths)

    @property
    def cost(self) -> int:
        """Parameters that go with the next step."""
        return self.unit_params * (self.width - self.widths[self.at + 1])

    @property
    def score(self) -> float:
        """Mean score of the units that go with the next step, the lowest that are left."""
        size = len(self.scores)
        going = self.scores[size - self.width : size - self.widths[self.at + 1]]
        return sum(going) / len(going)


def ladder(spaces: Sequence[Space], widths: Sequence[int], scores: Mapping[tuple[int, str], Tensor]) -> Ladder:
    """The ladder of the spaces of one kind in one layer, which share their width.

    Args:
        spaces: One, or one per expert.
        widths: Legal ones, descending.
        scores: Of the units of each space, by layer and name; where there are none, every layer gives up its units
            evenly.
    """
    first = spaces[0]
    found = [
        scores[first.layer, space.name].sort().values.reshape(space.width, space.scale).mean(1)
        if scores
        else torch.arange(space.width) / space.width
        for space in spaces
    ]
    params = sum(space.unit_params * space.scale for space in spaces)
    return Ladder(first.kind, first.layer, widths, torch.stack(found).mean(0).tolist(), params)


def descend_(ladders: Sequence[Ladder], goal: float) -> None:
    """Take the steps with the lowest scores until `goal` parameters are gone.

    A step that would remove too much ends its ladder; cheaper ones go on. What is left over is then less than any step
    costs, and the cheapest is still taken if that comes nearer.

    Args:
        ladders: Where to step down.
        goal: Parameters to remove from here.
    """
    heap = [(one.score, number) for number, one in enumerate(ladders) if not one.low]
    heapq.heapify(heap)
    while heap:
        _, number = heapq.heappop(heap)
        one = ladders[number]
        if one.cost <= goal:
            goal -= one.cost
            one.at += 1
            if not one.low:
                heapq.heappush(heap, (one.score, number))
    left = [one for one in ladders if not one.low]
    cheapest = min(left, key=lambda one: one.cost, default=None)
    if cheapest is not None and cheapest.cost < 2 * goal:
        cheapest.at += 1


def spaces_by_layer(arch: ArchSpec, name: str) -> dict[int, list[Space]]:
    """The spaces of a kind, by layer."""
    found: dict[int, list[Space]] = {}
    for space in arch.of(name):
        found.setdefault(space.layer, []).append(space)
    return found
