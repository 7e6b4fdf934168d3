"""One ranking of all units of a model, and how many of the lowest a budget removes."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil

import torch
from torch import Tensor

from ..arch.spec import ArchSpec, Space
from ..config.pruning import StructPruneConfig
from ..errors import StructPruneError


@dataclass
class LayerWidth:
    """The width of one kind of space in one layer, which shrinks step by step: the widths that it may take from the
    widest on, the index `at` of the present one, the scores of the units, ascending, and the parameters of one unit.
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
    def least(self) -> bool:
        """Whether no step is left."""
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


def ranked_widths(
    config: StructPruneConfig,
    arch: ArchSpec,
    legal: Mapping[str, Sequence[int]],
    scores: Mapping[tuple[int, str], Tensor],
) -> dict[str, dict[int, int]]:
    """Widths by kind of space and layer from one ranking of all units.

    With `sparsity`, spaces compete for the budget. With `widths`, each width is the mean over the layers, and a budget
    of its own. The budget is met to within half of the cheapest step.
    """
    by_kind = {
        name: [_layer_width(config, spaces, legal[name], scores) for spaces in spaces_by_layer(arch, name).values()]
        for name in legal
    }
    if config.widths is None:
        every = [layer for layers in by_kind.values() for layer in layers]
        _remove_(config, every, (config.sparsity or 0.0) * sum(arch.layer_params))
    else:
        for name, width in config.widths.items():
            assert isinstance(width, int)  # `contradictions` has refused numbers for single layers here
            goal = sum(layer.unit_params * max(len(layer.scores) - width, 0) for layer in by_kind[name])
            _remove_(config, by_kind[name], goal)
    return {name: {layer.layer: layer.width for layer in layers} for name, layers in by_kind.items()}


def _layer_width(
    config: StructPruneConfig,
    spaces: Sequence[Space],
    legal: Sequence[int],
    scores: Mapping[tuple[int, str], Tensor],
) -> LayerWidth:
    """The width of the spaces of one kind in one layer, which share it."""
    first = spaces[0]
    scores_by_space = [
        scores[space.key].sort().values.reshape(space.width, space.scale).mean(1)
        if scores
        else torch.arange(space.width) / space.width
        for space in spaces
    ]
    params = sum(space.unit_params * space.scale for space in spaces)
    unit_scores = torch.stack(scores_by_space).mean(0).tolist()
    return LayerWidth(first.kind, first.layer, candidate_widths(config, first, legal), unit_scores, params)


def candidate_widths(config: StructPruneConfig, space: Space, legal: Sequence[int]) -> list[int]:
    """The widths that a layer may take from `min_width` on where layers get widths of their own, descending."""
    widths = sorted({*(width for width in legal if width < space.width), space.width})
    rounded = multiples(widths, space.width, config.round_to if space.rounds else 1)
    return [width for width in rounded if width >= ceil(config.min_width * space.width)][::-1]


def multiples(legal: Sequence[int], size: int, multiple: int) -> list[int]:
    """The multiples among legal widths, and the full width; all legal ones where no multiple is narrower."""
    narrower = [width for width in legal if width % multiple == 0 and width < size]
    return [*narrower, size] if narrower else list(legal)


def _remove_(config: StructPruneConfig, layers: Sequence[LayerWidth], goal: float) -> None:
    """Take the steps with the lowest scores until `goal` parameters are gone.

    A layer whose next step would remove too much stays as it is, and cheaper ones go on. What is then still to be
    removed is less than any step costs, and the cheapest step is still taken if that comes nearer to the goal.
    """
    most = sum(layer.unit_params * (layer.widths[0] - layer.widths[-1]) for layer in layers)
    if goal > most:
        amount = f"sparsity={config.sparsity}" if config.widths is None else f"widths={config.widths}"
        raise StructPruneError(
            f"{amount} asks for {goal:,.0f} parameters to go, but with min_width={config.min_width} of their units "
            f"kept the layers give at most {most:,}; change either."
        )
    heap = [(layer.score, number) for number, layer in enumerate(layers) if not layer.least]
    heapq.heapify(heap)
    while heap:
        _, number = heapq.heappop(heap)
        layer = layers[number]
        if layer.cost <= goal:
            goal -= layer.cost
            layer.at += 1
            if not layer.least:
                heapq.heappush(heap, (layer.score, number))
    unfinished = [layer for layer in layers if not layer.least]
    cheapest = min(unfinished, key=lambda layer: layer.cost, default=None)
    if cheapest is not None and cheapest.cost < 2 * goal:
        cheapest.at += 1


def spaces_by_layer(arch: ArchSpec, name: str) -> dict[int, list[Space]]:
    """The spaces of a kind, by layer."""
    by_layer: dict[int, list[Space]] = {}
    for space in arch.of(name):
        by_layer.setdefault(space.layer, []).append(space)
    return by_layer
