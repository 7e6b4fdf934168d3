"""Shapes of a smaller model that meet a wish, and those of them that measured losses speak for."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from ..arch.spec import LAYER, Width, Widths
from .knapsack import Option, cheapest


# So many widths of a space are told apart at a time, and so many times at most.
AT_A_TIME = 16
ROUNDS = 12
Key = tuple[int, str]


@dataclass(frozen=True)
class Shape:
    """The widths of a smaller model.

    Attributes:
        widths: The widths by kind of space: one number, or one per layer of the dense model.
        layers: The layers that stay, ascending; None where all of them do.
    """

    widths: Widths
    layers: tuple[int, ...] | None = None

    def after_removal(self) -> Widths:
        """The widths with the number of layers among them, and by the numbers that the layers have then."""
        if self.layers is None:
            return self.widths
        new: dict[str, Width] = {LAYER: len(self.layers)}
        for name, width in self.widths.items():
            new[name] = (
                width
                if isinstance(width, int)
                else {place: width[layer] for place, layer in enumerate(self.layers) if layer in width}
            )
        return new


@dataclass(frozen=True)
class Curves:
    """What a model loses with a part of it gone, in nats per token.

    Attributes:
        units: The loss by the number of units removed, from 0 on, by layer and kind of space.
        layers: The loss without a layer, by layer; empty where whole layers are not offered.
    """

    units: Mapping[Key, Sequence[float]]
    layers: Mapping[int, float]


@dataclass(frozen=True)
class Resource:
    """Something that a wish limits: parameters, bytes, or operations.

    Attributes:
        need: How much of it has to go.
        unit: How much goes with one unit of width, by layer and kind of space.
        layer: How much goes with a whole layer, by layer.
    """

    need: float
    unit: Mapping[Key, float]
    layer: Mapping[int, float]


def searched_shape(
    rungs: Mapping[Key, Sequence[int]], curves: Curves, resources: Sequence[Resource], most_gone: int = 0
) -> Shape:
    """The shape of least predicted loss in which each layer has widths of its own, or goes.

    Losses of different places are taken to add up. Few widths of each space are told apart at first, then closer ones
    around the best, until the best stays where it is among its next neighbours.
    """
    size = {key: len(curves.units[key]) - 1 for key in rungs}

    def option(key: Key, width: int) -> Option:
        gone = size[key] - width
        return Option(curves.units[key][gone], tuple(one.unit.get(key, 0.0) * gone for one in resources))

    exits = {
        layer: (
            Option(loss, tuple(one.layer.get(layer, 0.0) for one in resources)),
            [key for key in rungs if key[0] == layer],
        )
        for layer, loss in curves.layers.items()
        if most_gone
    }
    stride = max(map(len, rungs.values())) // AT_A_TIME + 1
    few = {key: thinned(range(len(widths))) for key, widths in rungs.items()}
    best: dict[Key, int] = {}
    for _ in range(ROUNDS):
        found, gone = cheapest(
            {key: [option(key, rungs[key][place]) for place in places] for key, places in few.items()},
            exits,
            [one.need for one in resources],
            most_gone,
        )
        before, best = best, {key: few[key][index] for key, index in found.items()}
        if stride == 1 and best == before:
            break
        stride = max(stride // 4, 1)
        few |= {key: _around(place, stride, len(rungs[key])) for key, place in best.items()}
    widths: dict[str, dict[int, int]] = {}
    for (layer, name), place in best.items():
        widths.setdefault(name, {})[layer] = rungs[layer, name][place]
    stay = None
    if gone:
        stay = tuple(layer for layer in curves.layers if layer not in gone)
    return Shape(widths, stay)


def thinned(widths: Sequence[int]) -> list[int]:
    """At most `AT_A_TIME` of several widths, evenly, with the first and the last."""
    last = len(widths) - 1
    if last < AT_A_TIME:
        return list(widths)
    return [widths[round(number * last / (AT_A_TIME - 1))] for number in range(AT_A_TIME)]


def _around(place: int, stride: int, count: int) -> list[int]:
    """The places at multiples of a stride from one, `AT_A_TIME` at most, of `count` places."""
    half = AT_A_TIME // 2
    return [other for n in range(-half, half) if 0 <= (other := place + n * stride) < count]


def uniform_shapes(
    choices: Mapping[str, Sequence[int]], curves: Curves, resource: Resource, most_gone: int = 0
) -> list[tuple[float, Shape]]:
    """The shapes with one width for all layers that save enough and no more than they have to, each with its predicted
    loss, the best first.

    Every number of layers and of units of the coarser spaces is tried; the space with the most widths takes the widest
    that saves enough. The layers that go are those whose loss exceeds that of narrowing them by least.
    """
    finest = max(choices, key=lambda name: len(choices[name]))
    others = [name for name in choices if name != finest]
    found = []
    for coarse in product(*(thinned(choices[name]) for name in others)):
        for gone in range(most_gone + 1):
            widths: dict[str, int] = dict(zip(others, coarse, strict=True))
            shape = _widest(widths, finest, choices[finest], curves, resource, gone)
            if shape is not None:
                found.append(shape)
    return sorted(found, key=lambda pair: pair[0])


def _widest(
    coarse: dict[str, int], finest: str, widths: Sequence[int], curves: Curves, resource: Resource, gone: int
) -> tuple[float, Shape] | None:
    """The shape with the widest units of one space that saves enough, and its predicted loss; None if none does."""
    order = sorted(widths, reverse=True)
    # What is saved grows from one width to the next narrower one.
    index = bisect_right(
        order, False, key=lambda width: _predicted({**coarse, finest: width}, curves, resource, gone)[1] >= 0
    )
    if index == len(order):
        return None
    chosen = {**coarse, finest: order[index]}
    loss, _, stay = _predicted(chosen, curves, resource, gone)
    return loss, Shape(chosen, stay if gone else None)


def _predicted(
    widths: Mapping[str, int], curves: Curves, resource: Resource, gone: int
) -> tuple[float, float, tuple[int, ...]]:
    """The predicted loss of a uniform shape, by how much it saves too much, and the layers that stay."""
    loss, saved = dict.fromkeys(curves.layers, 0.0), dict.fromkeys(curves.layers, 0.0)
    for (layer, name), curve in curves.units.items():
        removed = max(len(curve) - 1 - widths[name], 0)
        loss[layer] = loss.get(layer, 0.0) + curve[removed]
        saved[layer] = saved.get(layer, 0.0) + resource.unit.get((layer, name), 0.0) * removed
    first = sorted(curves.layers, key=lambda layer: curves.layers[layer] - loss[layer])[:gone]
    for layer in first:
        loss[layer], saved[layer] = curves.layers[layer], resource.layer.get(layer, 0.0)
    stay = tuple(layer for layer in sorted(loss) if layer not in first)
    return sum(loss.values()), sum(saved.values()) - resource.need, stay
