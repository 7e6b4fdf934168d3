"""Shapes of a smaller model that save enough, and those of them that measured losses speak for."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TypeVar

from transformers import PreTrainedModel

from ..arch.spec import ArchSpec, Widths
from ..config.pruning import StructPruneConfig
from ..errors import StructPruneError
from .allocation import legal_widths, spaces_by_layer
from .budget import budget_of


Key = tuple[int, str]  # a layer and a kind of space
K = TypeVar("K", bound=Hashable)
# What a model loses in nats per token by the number of units removed, from 0 on, in one layer and kind of space.
Curves = Mapping[Key, Sequence[float]]

# The number of widths per space that a step of the search compares, and the largest number of steps.
AT_A_TIME = 16
ROUNDS = 12
# The solver stops when its choice loses at most this share more than the proven minimum, or after so many seconds.
GAP = 1e-4
SECONDS = 60.0
# The share of all losses by which a choice that saves nothing beats another choice of the same loss.
TIE = 1e-7


@dataclass(frozen=True)
class Resource:
    """Something of which a config wants less, such as parameters: how much has to go, and how much goes with one unit
    of width in one layer and kind of space.
    """

    need: float
    unit: Mapping[Key, float]


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
        removed = len(curves[key]) - 1 - width
        return Option(curves[key][removed], tuple(resource.unit.get(key, 0.0) * removed for resource in resources))

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
    choices: Mapping[str, Sequence[int]], curves: Curves, resource: Resource
) -> list[tuple[float, Widths]]:
    """The shapes with one width for all layers that save enough and no more than they have to, each with its predicted
    loss, the best first.

    Every number of units of the coarser spaces is tried; the space with the most widths takes the widest that saves
    enough.
    """
    finest = max(choices, key=lambda name: len(choices[name]))
    others = [name for name in choices if name != finest]
    widest_first = sorted(choices[finest], reverse=True)
    shapes: list[tuple[float, Widths]] = []
    for widths_of_others in product(*(thinned(choices[name]) for name in others)):
        coarse = dict(zip(others, widths_of_others, strict=True))

        def saved(width: int, coarse: Widths = coarse) -> float:
            removed = _removed(curves, {**coarse, finest: width})
            return sum(resource.unit.get(key, 0.0) * units for key, units in removed.items())

        index = bisect_left(widest_first, resource.need, key=saved)  # a narrower width saves more
        if index < len(widest_first):
            widths = {**coarse, finest: widest_first[index]}
            shapes.append((predicted_loss(curves, widths), widths))
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


def resources(
    config: StructPruneConfig, arch: ArchSpec, model: PreTrainedModel, names: Collection[str]
) -> list[Resource]:
    """What a config wants saved, and what saves it: for widths given as means one resource for each space, and one
    otherwise.
    """
    params = {
        (layer, name): float(sum(space.unit_params * space.scale for space in spaces))
        for name in names
        for layer, spaces in spaces_by_layer(arch, name).items()
    }
    if config.widths is not None:
        return [_mean_width(config, arch, name, params) for name in names]
    if config.budget is None:
        return [Resource((config.sparsity or 0.0) * sum(arch.layer_params), params)]
    legal = legal_widths(config, arch, model.config)
    name, limit, dense, cost = budget_of(config, arch, model, names)
    need = cost({kind: arch.widths(kind) for kind in names}) - limit
    if name in ("parameters", "bytes"):
        return [Resource(need / (model.dtype.itemsize if name == "bytes" else 1), params)]
    units = {}
    for kind in names:
        least = min(legal[kind])
        removed = sum(size - min(least, size) for size in arch.widths(kind).values())
        units[kind] = (dense - cost({kind: least})) / max(removed, 1)
    return [Resource(need, {key: units[key[1]] for key in params})]


def _mean_width(config: StructPruneConfig, arch: ArchSpec, name: str, params: Mapping[Key, float]) -> Resource:
    """The parameters that go where a space has so many units in the mean over the layers."""
    width = (config.widths or {})[name]
    assert isinstance(width, int)  # the config refuses numbers for single layers here
    of_space = {key: count for key, count in params.items() if key[1] == name and key[0] not in config.skip_layers}
    sizes = arch.widths(name)
    need = sum(count * max(sizes[layer] - width, 0) for (layer, _), count in of_space.items())
    return Resource(need, of_space)
