"""Shapes with one width for all layers, and what measured losses predict of a shape."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from itertools import product

from ..arch.spec import Widths


Key = tuple[int, str]  # a layer and a kind of space
# What a model loses in nats per token by the number of units removed, from 0 on, in one layer and kind of space.
Curves = Mapping[Key, Sequence[float]]

# The number of widths that are tried of each space but the one with the most.
MOST_TRIED = 16


def thinned(widths: Sequence[int]) -> list[int]:
    """At most `MOST_TRIED` of several widths, evenly, with the first and the last."""
    last = len(widths) - 1
    if last < MOST_TRIED:
        return list(widths)
    return [widths[round(number * last / (MOST_TRIED - 1))] for number in range(MOST_TRIED)]


def uniform_shapes(
    choices: Mapping[str, Sequence[int]], curves: Curves, is_small: Callable[[Widths], bool]
) -> list[tuple[float, Widths]]:
    """The shapes with one width for all layers that are small enough and no smaller than they have to be, each with
    its predicted loss, the best first.

    Every number of units of the coarser spaces is tried; the space with the most widths takes the widest that is still
    small enough.
    """
    finest = max(choices, key=lambda name: len(choices[name]))
    others = [name for name in choices if name != finest]
    widest_first = sorted(choices[finest], reverse=True)
    shapes: list[tuple[float, Widths]] = []
    for widths_of_others in product(*(thinned(choices[name]) for name in others)):
        coarse = dict(zip(others, widths_of_others, strict=True))
        with_finest = [{**coarse, finest: width} for width in widest_first]
        index = bisect_left(with_finest, True, key=is_small)
        shapes += [(predicted_loss(curves, widths), widths) for widths in with_finest[index : index + 1]]
    return sorted(shapes, key=lambda pair: pair[0])


def predicted_loss(curves: Curves, widths: Widths) -> float:
    """The total of the measured losses of what is removed."""
    return sum(curves[key][units] for key, units in _removed(curves, widths).items())


def _removed(curves: Curves, widths: Widths) -> dict[Key, int]:
    """How many units go in each layer and kind of space that was measured."""
    removed = {}
    for (layer, name), curve in curves.items():
        width = widths[name]
        stays = width if isinstance(width, int) else width.get(layer, len(curve) - 1)
        removed[layer, name] = max(len(curve) - 1 - stays, 0)
    return removed
