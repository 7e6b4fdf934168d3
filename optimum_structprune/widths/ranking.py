"""One ranking of all units of a model, and how many of the lowest a budget removes."""

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
        name: The kind of space.
        layer: The index of the layer.
        widths: The widths, descending; the ladder starts at the first.
        scores: The scores of the units, ascending, one for each unit of width.
        unit_params: The number of parameters that go with one unit of width.
        at: The index of the present width.
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
        """Whether the ladder is at its last width."""
        return self.at + 1 == len(self.widths)

    @property
    def cost(self) -> int:
        """The number of parameters that go with the next step."""
        return self.unit_params * (self.width - self.widths[self.at + 1])

    @property
    def score(self) -> float:
        """The mean score of the units that go with the next step, which are the lowest of those kept so far."""
        size = len(self.scores)
        going = self.scores[size - self.width : size - self.widths[self.at + 1]]
        return sum(going) / len(going)


def ladder(spaces: Sequence[Space], widths: Sequence[int], scores: Mapping[tuple[int, str], Tensor]) -> Ladder:
    """The ladder of the spaces of one kind in one layer, which share their width."""
    first = spaces[0]
    scores_by_space = [
        scores[first.layer, space.name].sort().values.reshape(space.width, space.scale).mean(1)
        if scores
        else torch.arange(space.width) / space.width
        for space in spaces
    ]
    params = sum(space.unit_params * space.scale for space in spaces)
    return Ladder(first.kind, first.layer, widths, torch.stack(scores_by_space).mean(0).tolist(), params)


def descend_(ladders: Sequence[Ladder], goal: float) -> None:
    """Take the steps with the lowest scores until `goal` parameters are gone.

    A step that would remove too much ends its ladder, and cheaper ones go on. What is then still to be removed is less
    than any step costs, and the cheapest step is still taken if that comes nearer to the goal.
    """
    heap = [(ladder.score, number) for number, ladder in enumerate(ladders) if not ladder.low]
    heapq.heapify(heap)
    while heap:
        _, number = heapq.heappop(heap)
        ladder = ladders[number]
        if ladder.cost <= goal:
            goal -= ladder.cost
            ladder.at += 1
            if not ladder.low:
                heapq.heappush(heap, (ladder.score, number))
    unfinished = [ladder for ladder in ladders if not ladder.low]
    cheapest = min(unfinished, key=lambda ladder: ladder.cost, default=None)
    if cheapest is not None and cheapest.cost < 2 * goal:
        cheapest.at += 1


def spaces_by_layer(arch: ArchSpec, name: str) -> dict[int, list[Space]]:
    """The spaces of a kind, by layer."""
    by_layer: dict[int, list[Space]] = {}
    for space in arch.of(name):
        by_layer.setdefault(space.layer, []).append(space)
    return by_layer
