"""Shapes of a smaller model that save enough, and those of them that measured losses speak for."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import TypeVar

from transformers import PreTrainedModel

from ..arch.spec import LAYER, ArchSpec, Width, Widths
from ..config.pruning import StructPruneConfig
from ..errors import StructPruneError
from .allocation import legal_widths, spaces_by_layer
from .budget import budget_of


Key = tuple[int, str]  # a layer and a kind of space
K = TypeVar("K", bound=Hashable)
Predicted = tuple[float, float, tuple[int, ...]]

# The number of widths per space that a step of the search compares, and the largest number of steps.
AT_A_TIME = 16
ROUNDS = 12
# The solver stops when its choice loses at most this share more than the proven minimum, or after so many seconds.
GAP = 1e-4
SECONDS = 60.0
# The share of all losses by which a choice that saves nothing beats another choice of the same loss.
TIE = 1e-7


@dataclass(frozen=True)
class Shape:
    """The widths of a smaller model, and the layers of the dense one that stay, ascending; None where all do."""

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
    """What a model loses in nats per token by the number of units removed, from 0 on, in one layer and kind of space;
    and without a whole layer, where these are offered.
    """

    units: Mapping[Key, Sequence[float]]
    layers: Mapping[int, float]


@dataclass(frozen=True)
class Resource:
    """Something of which a config wants less, such as parameters: how much has to go, how much goes with one unit of
    width in one layer and kind of space, and how much with a whole layer.
    """

    need: float
    unit: Mapping[Key, float]
    layer: Mapping[int, float]


@dataclass(frozen=True)
class Option:
    """One thing that a group may do: what it loses, and what it saves of each resource."""

    loss: float
    saved: tuple[float, ...]


def searched_widths(
    candidates: Mapping[Key, Sequence[int]], curves: Curves, resources: Sequence[Resource]
) -> dict[str, dict[int, int]]:
    """The widths of each layer with the least predicted loss, by kind of space.

    The losses in different layers are assumed to add up. The search compares a few widths of each space first, then
    closer ones around the best, until the best does not change among its direct neighbours.
    """

    def option(key: Key, width: int) -> Option:
        removed = len(curves.units[key]) - 1 - width
        return Option(
            curves.units[key][removed], tuple(resource.unit.get(key, 0.0) * removed for resource in resources)
        )

    stride = max(map(len, candidates.values())) // AT_A_TIME + 1
    near = {key: thinned(range(len(widths))) for key, widths in candidates.items()}
    best: dict[Key, int] = {}
    for _ in range(ROUNDS):
        options = {key: [option(key, candidates[key][place]) for place in places] for key, places in near.items()}
        chosen = cheapest(options, [resource.need for resource in resources])
        before, best = best, {key: near[key][index] for key, index in chosen.items()}
        if stride == 1 and best == before:
            break
        stride = max(stride // 4, 1)
        steps = [step * stride for step in range(-AT_A_TIME // 2, AT_A_TIME // 2)]
        near = {
            key: [place + step for step in steps if 0 <= place + step < len(candidates[key])]
            for key, place in best.items()
        }
    widths: dict[str, dict[int, int]] = {}
    for (layer, name), place in best.items():
        widths.setdefault(name, {})[layer] = candidates[layer, name][place]
    return widths


def cheapest(groups: Mapping[K, Sequence[Option]], need: Sequence[float]) -> dict[K, int]:
    """The index of one option for each group, such that enough is saved with the least loss: a knapsack with one
    choice from each group (Kellerer, Pferschy & Pisinger 2004, chapter 11), which `scipy.optimize.milp` solves.
    """
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    columns = [(key, index) for key, options in groups.items() for index in range(len(options))]
    options = [option for of_group in groups.values() for option in of_group]
    row = {key: number for number, key in enumerate(groups)}
    places = ([row[key] for key, _ in columns], range(len(columns)))
    one_each = csr_array((np.ones(len(columns)), places), shape=(len(groups), len(columns)))
    saved = np.array([option.saved for option in options]).T
    unit = np.maximum(np.abs(saved).max(1, keepdims=True), 1e-30)
    loss = np.array([option.loss for option in options])
    objective = loss / max(np.abs(loss).max(), 1e-30) + TIE * (saved / unit).sum(0)
    least = np.array(need)
    for slack in (0.0, 1e-6):  # the solver takes a constraint for met if it is missed by less
        solution = milp(
            objective,
            integrality=np.ones(len(columns)),
            bounds=Bounds(0, 1),
            constraints=[
                LinearConstraint(one_each, 1, 1),
                LinearConstraint(saved / unit, lb=(least * (1 + slack)) / unit[:, 0]),
            ],
            options={"mip_rel_gap": GAP, "time_limit": SECONDS},
        )
        if solution.x is None:
            raise StructPruneError("No choice of widths saves so much; ask for less, or add targets.")
        chosen = solution.x > 0.5
        if (saved[:, chosen].sum(1) >= least - 1e-9 * np.abs(least)).all():
            break
    return {key: index for (key, index), is_chosen in zip(columns, chosen, strict=True) if is_chosen}


def thinned(widths: Sequence[int]) -> list[int]:
    """At most `AT_A_TIME` of several widths, evenly, with the first and the last."""
    last = len(widths) - 1
    if last < AT_A_TIME:
        return list(widths)
    return [widths[round(number * last / (AT_A_TIME - 1))] for number in range(AT_A_TIME)]


def uniform_shapes(
    choices: Mapping[str, Sequence[int]], curves: Curves, resource: Resource, most_skipped: int = 0
) -> list[tuple[float, Shape]]:
    """The shapes with one width for all layers that save enough and no more than they have to, each with its predicted
    loss, the best first.

    Every number of layers and of units of the coarser spaces is tried; the space with the most widths takes the widest
    that saves enough. The layers that go are those whose loss exceeds that of narrowing them by least.
    """
    finest = max(choices, key=lambda name: len(choices[name]))
    others = [name for name in choices if name != finest]
    widest_first = sorted(choices[finest], reverse=True)
    shapes = []
    for coarse, skipped in product(product(*(thinned(choices[name]) for name in others)), range(most_skipped + 1)):
        rest = dict(zip(others, coarse, strict=True))
        predict = partial(_predicted, rest, finest, curves, resource, skipped)

        def saved(width: int, predict: Callable[[int], Predicted] = predict) -> float:
            return predict(width)[1]

        index = bisect_left(widest_first, resource.need, key=saved)  # a narrower width saves more
        if index < len(widest_first):
            loss, _, stay = predict(widest_first[index])
            shapes.append((loss, Shape({**rest, finest: widest_first[index]}, stay if skipped else None)))
    return sorted(shapes, key=lambda pair: pair[0])


def _predicted(
    coarse_widths: Mapping[str, int], finest: str, curves: Curves, resource: Resource, skipped: int, width: int
) -> Predicted:
    """The predicted loss of a uniform shape without some layers, what it saves, and the layers that stay."""
    widths = {**coarse_widths, finest: width}
    loss, saved = dict.fromkeys(curves.layers, 0.0), dict.fromkeys(curves.layers, 0.0)
    for (layer, name), curve in curves.units.items():
        removed = max(len(curve) - 1 - widths[name], 0)
        loss[layer] = loss.get(layer, 0.0) + curve[removed]
        saved[layer] = saved.get(layer, 0.0) + resource.unit.get((layer, name), 0.0) * removed
    gone = sorted(curves.layers, key=lambda layer: curves.layers[layer] - loss[layer])[:skipped]
    for layer in gone:
        loss[layer], saved[layer] = curves.layers[layer], resource.layer.get(layer, 0.0)
    stay = tuple(layer for layer in sorted(loss) if layer not in gone)
    return sum(loss.values()), sum(saved.values()), stay


def resources(
    config: StructPruneConfig, arch: ArchSpec, model: PreTrainedModel, names: Collection[str], layers: bool = False
) -> list[Resource]:
    """What a config wants saved, and what saves it: for widths given as means one resource for each space, and one
    otherwise.
    """
    params = {
        (layer, name): float(sum(space.unit_params * space.scale for space in spaces))
        for name in names
        for layer, spaces in spaces_by_layer(arch, name).items()
    }
    whole = {layer: float(count) for layer, count in enumerate(arch.layer_params)} if layers else {}
    if config.widths is not None:
        return [_mean_width(config, arch, name, params) for name in names]
    if config.budget is None:
        return [Resource((config.sparsity or 0.0) * sum(arch.layer_params), params, whole)]
    legal = legal_widths(config, arch, model.config)
    name, limit, dense, cost = budget_of(config, arch, model, names)
    need = cost({kind: arch.widths(kind) for kind in names}) - limit
    if name in ("parameters", "bytes"):
        return [Resource(need / (model.dtype.itemsize if name == "bytes" else 1), params, whole)]
    units = {}
    for kind in names:
        least = min(legal[kind])
        removed = sum(size - min(least, size) for size in arch.widths(kind).values())
        units[kind] = (dense - cost({kind: least})) / max(removed, 1)
    layer_cost = float(dense - cost({LAYER: arch.num_layers - 1})) if layers else 0.0
    return [Resource(need, {key: units[key[1]] for key in params}, dict.fromkeys(whole, layer_cost))]


def _mean_width(config: StructPruneConfig, arch: ArchSpec, name: str, params: Mapping[Key, float]) -> Resource:
    """The parameters that go where a space has so many units in the mean over the layers."""
    width = (config.widths or {})[name]
    assert isinstance(width, int)  # the config refuses numbers for single layers here
    of_space = {key: count for key, count in params.items() if key[1] == name and key[0] not in config.skip_layers}
    sizes = arch.widths(name)
    need = sum(count * max(sizes[layer] - width, 0) for (layer, _), count in of_space.items())
    return Resource(need, of_space, {})
