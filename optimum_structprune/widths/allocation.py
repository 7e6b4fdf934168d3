"""Legal widths from a share, from given widths, from one ranking of all units, or the largest within a budget."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import ceil, lcm
from statistics import fmean
from typing import NamedTuple, cast

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from ..arch.meta import is_offloaded, shrunk_skeleton
from ..arch.shrink import legal_sizes, shrunk_config
from ..arch.spec import CHANNEL, EXPERT, GROUP, LAYER, MODEL, TOKEN, VOCAB, ArchSpec, Space, Width, Widths
from ..config.pruning import AUTO, CACHE, ONE_WIDTH, StructPruneConfig
from ..errors import StructPruneError
from ..registry import did_you_mean


LegalWidths = Mapping[str, Sequence[int]]  # of kinds of space, ascending
Scores = Mapping[tuple[int, str], Tensor]  # of units, by layer and kind of space, shape `(width,)`
# The share of its units that every layer keeps at least where layers get widths of their own: scores differ between
# layers for reasons of their own, and would empty some.
LEAST_KEPT = 0.1


def widths_of(
    config: StructPruneConfig, arch: ArchSpec, model: PreTrainedModel, scores: Scores | None = None
) -> Widths:
    """The final widths, in whichever way a config says how much is removed; see `target_widths`."""
    legal = legal_widths(config, arch, model.config)
    if config.budget is None:
        widths = target_widths(config, arch, legal, scores)
    else:
        widths = _within_budget(config, arch, model, legal, scores)
    shrunk_config(model.config, arch, widths)  # which may refuse together what it accepts one by one
    return widths


def target_widths(config: StructPruneConfig, arch: ArchSpec, legal: LegalWidths, scores: Scores | None) -> Widths:
    """The final width of each space, among legal ones: one number, or one per layer where layers may differ."""
    asked, same = asked_widths(config, arch), has_one_width(arch, legal)
    if LAYER in legal and len(legal) > 1 and not (same and {*map(type, (asked or {}).values())} <= {int}):
        raise StructPruneError(
            f"The layers of this {arch.model_type} model {'are to ' * same}differ in width, and {LAYER!r} would "
            f"number them anew; prune {LAYER!r} in a run of its own."
        )
    if not same and config.allocation == "search_uniform":
        raise StructPruneError(
            f"The layers of this {arch.model_type} model differ in width, and allocation='search_uniform' looks for "
            "one shape of all layers; choose allocation='search'."
        )
    check_may_differ(config, arch, list(legal))
    pruned = _without(arch, config.skip_layers, legal)
    if is_bounded(config, arch, list(legal)):
        return ranked_widths(config, pruned, legal, scores or {})
    round_to = {name: multiple_of(config, pruned, name) for name in legal}
    widths = asked or widths_for_sparsity(pruned, config.sparsity or 0.0, legal, round_to)
    if config.skip_layers or not same:
        return {name: _at_most(width, pruned.of(name)) for name, width in widths.items()}
    return widths


def legal_widths(config: StructPruneConfig, arch: ArchSpec, model_config: PretrainedConfig) -> LegalWidths:
    """The legal widths of the spaces that a config names, ascending, by kind of space; another width is refused."""
    names, asked = _named(config, arch), asked_widths(config, arch) or {}
    legal = {name: legal_sizes(model_config, arch, name) for name in names}
    for name, width in asked.items():
        _check_width(arch, name, width, legal[name])
    return legal


def _named(config: StructPruneConfig, arch: ArchSpec) -> list[str]:
    """Lists the spaces of a config; of its default, those of the model."""
    names = list(config.targets_or_default if config.widths is None else config.widths)
    if config.widths is None and config.targets is None:
        by_layer = config.allocation not in ONE_WIDTH and CACHE not in (config.budget or {})
        may = [name for name in names if arch.of(name) and not (by_layer and arch.of(name)[0].uniform)]
        names = may or list(arch.channels) or names
    for name in names:
        if name not in arch.offered:
            reason = dict(arch.missing).get(name, "").removesuffix(".")
            because = f": {reason}" if reason else ""
            raise StructPruneError(
                f"The model of type {arch.model_type!r} has no space {name!r} to prune{because}."
                f"{did_you_mean(name, arch.offered)}"
            )
    for name, width in (config.widths or {}).items():
        if isinstance(width, list) and len(width) != arch.num_layers:
            raise StructPruneError(
                f"widths[{name!r}] has a list of length {len(width)}, and the model has {arch.num_layers} layers; "
                f"list one width for each, or name layers: {dict(enumerate(width))}."
            )
    if config.widths is None:
        _check_disjoint(config, arch, names)
    return names


def asked_widths(config: StructPruneConfig, arch: ArchSpec) -> Widths | None:
    """The widths that a config gives, as one number if layers get the same."""
    if config.widths is None:
        return None
    widths: dict[str, Width] = {}
    for name, given in config.widths.items():
        width = cast("Width", dict(enumerate(given)) if isinstance(given, list) else given)
        if isinstance(width, dict) and len({*width.values()}) == 1 and width.keys() == arch.widths(name).keys():
            width = next(iter(width.values()))
        widths[name] = width
    return widths


def choices(config: StructPruneConfig, arch: ArchSpec, name: str, legal: Sequence[int]) -> Sequence[int]:
    """The widths of a space that `sparsity` may choose, ascending: legal ones, of channels multiples of `round_to`."""
    return multiples(legal, arch.of(name)[0].width, multiple_of(config, arch, name))


def smallest_widths(config: StructPruneConfig, arch: ArchSpec, legal: LegalWidths) -> Widths:
    """The smallest widths that `sparsity` may choose: one number, or one per layer where layers may differ."""
    smallest: dict[str, Width] = {}
    pruned = _without(arch, config.skip_layers, legal)
    for name, sizes in legal.items():
        spaces, narrowest = pruned.of(name), choices(config, pruned, name, sizes)[0]
        if is_bounded(config, arch, list(legal)):
            smallest[name] = {space.layer: candidate_widths(config, pruned, space, sizes)[-1] for space in spaces}
        else:
            smallest[name] = _at_most(narrowest, spaces) if config.skip_layers else narrowest
    return smallest


def is_bounded(config: StructPruneConfig, arch: ArchSpec, names: Collection[str]) -> bool:
    """Tells if each layer gets its own width of at least `LEAST_KEPT`, see `ranked_widths`.

    With an allocation of one width it does if the model's layers differ already and `widths` is not given.
    """
    return config.allocation not in ONE_WIDTH or (config.widths is None and not has_one_width(arch, names))


def has_one_width(arch: ArchSpec, names: Collection[str]) -> bool:
    """Tells if all layers have the same width in each of these kinds of space."""
    return all(len({space.width for space in arch.of(name)}) == 1 for name in names)


def check_may_differ(config: StructPruneConfig, arch: ArchSpec, names: Sequence[str]) -> None:
    """Refuse layers of different widths in spaces of one width."""
    cause = f"skip_layers={list(config.skip_layers)}" if config.skip_layers else f"allocation={config.allocation!r}"
    if config.allocation in ONE_WIDTH and not config.skip_layers:
        names = [name for name, width in (asked_widths(config, arch) or {}).items() if not isinstance(width, int)]
        cause = f"widths={config.widths}"
    for name in names:
        if reason := arch.uniform or arch.of(name)[0].uniform:
            raise StructPruneError(
                f"{cause} makes layers of different widths, which {name!r} of a {arch.model_type} model cannot have: "
                f"{reason}; use allocation='uniform' without skip_layers, and one number per space in widths."
            )


def _without(arch: ArchSpec, layers: Sequence[int], names: Collection[str]) -> ArchSpec:
    """The description without the spaces of some layers, so that nothing is removed there."""
    for layer in layers:
        if not 0 <= layer < arch.num_layers:
            raise StructPruneError(f"skip_layers names layer {layer}; the layers are 0 to {arch.num_layers - 1}.")
    others = replace(arch, spaces=tuple(space for space in arch.spaces if space.layer not in layers))
    if lost := [name for name in arch.names if name in names and name not in others.names]:
        raise StructPruneError(f"skip_layers={list(layers)} leaves no layer whose {lost[0]!r} could be pruned.")
    return others


def _at_most(width: Width, spaces: Sequence[Space]) -> dict[int, int]:
    return {space.layer: min(space.width_in({space.kind: width}), space.width) for space in spaces}


def _check_disjoint(config: StructPruneConfig, arch: ArchSpec, names: Sequence[str]) -> None:
    wide = [space.name for space in arch.model_spaces if space.name in names]
    if wide and len(names) > 1:
        raise StructPruneError(
            f"targets={names} has {wide[0]!r}, which takes a part of all the others with it, so neither sparsity nor "
            f"a budget says how much of each is to go; target {wide[0]!r} alone, or give widths."
        )
    experts = [name for name in names if not arch.of(name)[0].inside]
    inside = [name for name in names if name not in experts and arch.of(name)[0].experts is not None]
    if experts and inside:
        raise StructPruneError(
            f"targets={list(names)} would remove whole experts and channels inside them, and neither "
            f"sparsity nor a budget says how much of each; target {inside[0]!r}, which loses less, or "
            f"{experts[0]!r}, or give both widths."
        )


def _check_width(arch: ArchSpec, name: str, width: Width, legal: Sequence[int]) -> None:
    full = arch.widths(name)
    by_layer = {None: width} if isinstance(width, int) else dict(width)
    for layer, units in by_layer.items():
        if layer is not None and layer not in full:
            raise StructPruneError(
                f"widths[{name!r}] names layer {layer}, which has no {name!r}; the layers that have it are "
                f"{min(full)} to {max(full)}."
            )
        present = max(full.values()) if layer is None else full[layer]
        allowed = legal[: bisect_right(legal, present)]
        if units in allowed:
            continue
        place = bisect_left(allowed, units)
        nearest = [*allowed[max(place - 1, 0) : place + 1]]
        raise StructPruneError(
            f"widths[{name!r}]{'' if layer is None else [layer]} = {units} is not legal for this {arch.model_type} "
            f"model, which has {arch.of(name)[0].size}; the nearest legal choice is {' or '.join(map(str, nearest))}."
        )


def widths_for_sparsity(
    arch: ArchSpec, sparsity: float, legal: LegalWidths, round_to: Mapping[str, int]
) -> dict[str, int]:
    """Widths that remove a share of the layers' parameters.

    Spaces are taken in the order of the cost of their units, the largest first. Each gets the smallest legal width
    that is not below its proportional share, unless the later ones could not make up for it. The last one absorbs what
    is then still to be removed, to the nearest multiple of its number in `round_to`.
    """
    goal = sparsity * sum(arch.layer_params)
    size = {name: arch.of(name)[0].size for name in legal}
    cost = {name: sum(space.unit_params * space.scale for space in arch.of(name)) for name in legal}
    may = {name: multiples(legal[name], size[name], round_to[name]) for name in legal}
    removable = {name: cost[name] * (size[name] - may[name][0]) for name in legal}
    if goal > sum(removable.values()):
        share = sum(removable.values()) / sum(arch.layer_params)
        others = [kind for kind in (*arch.channels, "attention") if kind in {*arch.names} - {*legal}]
        more = f", or add targets: {', '.join(map(repr, others))}" if others else ""
        raise StructPruneError(
            f"sparsity={sparsity} is more than {', '.join(legal)} can give: at most {share:.3f} of the layers' "
            f"parameters; lower it{more}."
        )
    order = sorted(legal, key=lambda name: -cost[name])
    widths: dict[str, int] = {}
    for position, name in enumerate(order):
        rest = order[position + 1 :]
        ideal = size[name] * (1 - goal / sum(cost[other] * size[other] for other in [name, *rest]))
        if rest:
            room = float(sum(removable[other] for other in rest))
            fitting = bisect_right(may[name], room, key=lambda width: goal - cost[name] * (size[name] - width))
            widths[name] = may[name][min(bisect_left(may[name], ideal), fitting - 1)]
        else:
            place = bisect_left(may[name], ideal)
            nearest = may[name][max(place - 1, 0) : place + 1]
            widths[name] = min(nearest, key=lambda width: abs(width - ideal))
        goal -= cost[name] * (size[name] - widths[name])
    return widths


@dataclass
class LayerWidth:
    """The width of one kind of space in one layer, which shrinks step by step."""

    layer: int
    widths: Sequence[int]  # all that it may take, descending
    unit_params: int  # the number of parameters of one unit
    scores: Sequence[float]  # the mean score of the units that go with each step
    at: int = 0  # the index of the present width

    @property
    def cost(self) -> int:
        """The number of parameters that go with the next step."""
        return self.unit_params * (self.widths[self.at] - self.widths[self.at + 1])


def ranked_widths(
    config: StructPruneConfig, arch: ArchSpec, legal: LegalWidths, scores: Scores
) -> dict[str, dict[int, int]]:
    """Widths by kind of space and layer from one ranking of all units, with scores `(width,)` by layer and kind.

    With `sparsity`, spaces compete for the budget. With `widths`, each width is the mean over the layers, and a budget
    of its own. The budget is met to within half of the cheapest step.
    """
    by_kind: dict[str, list[LayerWidth]] = {name: [] for name in legal}
    for name, of_layers in by_kind.items():
        for layer, spaces in arch.by_layer(name).items():  # those of experts in one layer share their width
            widths, size = candidate_widths(config, arch, spaces[0], legal[name]), spaces[0].width
            unit_scores = (scores[layer, name].sort().values if scores else torch.arange(size) / size).tolist()
            going = [fmean(unit_scores[size - wide : size - narrow]) for wide, narrow in pairwise(widths)]
            params = sum(space.unit_params * space.scale for space in spaces)
            of_layers.append(LayerWidth(layer, widths, params, going))
    if config.widths is None:
        every = [layer for layers in by_kind.values() for layer in layers]
        _remove_(config, every, (config.sparsity or 0.0) * sum(arch.layer_params))
    else:
        for name, width in config.widths.items():
            assert isinstance(width, int)  # the config refuses numbers for single layers here
            goal = sum(layer.unit_params * max(layer.widths[0] - width, 0) for layer in by_kind[name])
            _remove_(config, by_kind[name], goal)
    return {name: {layer.layer: layer.widths[layer.at] for layer in layers} for name, layers in by_kind.items()}


def multiple_of(config: StructPruneConfig, arch: ArchSpec, name: str) -> int:
    """Gives the number that chosen widths of a space are multiples of.

    It is `round_to` for channels and tokens, `tensor_parallel` for KV groups and experts, and 1 for layers. Half of
    what `auto` gives is at most a hundredth of the layers' parameters, so that widths come that near to a goal.
    """
    spaces, parts = arch.of(name), config.tensor_parallel
    if spaces[0].unit not in (CHANNEL, TOKEN):
        return parts if spaces[0].unit in (GROUP, EXPERT) else 1
    if config.round_to != AUTO:
        return int(config.round_to)
    if spaces[0].unit == TOKEN:
        return 64
    largest = 2 * 0.01 * sum(arch.layer_params) / sum(space.unit_params * space.scale for space in spaces)
    powers = (1, 2, 4, 8, 16, 32, 64, 128)[: 7 if parts == 1 else 8]  # kernels of 4 bits want 128 on each device
    return max(power * parts for power in powers if power == 1 or power * parts <= largest)


def candidate_widths(config: StructPruneConfig, arch: ArchSpec, space: Space, legal: Sequence[int]) -> list[int]:
    """The widths that a layer of its own width may take, descending; see `LEAST_KEPT`."""
    widths = sorted({*(width for width in legal if width < space.width), space.width})
    rounded = multiples(widths, space.width, multiple_of(config, arch, space.kind))
    return [width for width in rounded if width >= ceil(LEAST_KEPT * space.width)][::-1]


def multiples(legal: Sequence[int], size: int, multiple: int) -> Sequence[int]:
    """The multiples among legal widths, and the full width; all legal ones where no multiple is narrower."""
    narrower: Sequence[int]
    if isinstance(legal, range):  # which may be very long
        step = lcm(legal.step, multiple)
        narrower = range(ceil(legal.start / step) * step, size, step)
        if narrower and size % step == 0:
            return range(narrower[0], size + 1, step)
    else:
        narrower = [width for width in legal if width % multiple == 0 and width < size]
    return [*narrower, size] if narrower else legal


def _remove_(config: StructPruneConfig, layers: Sequence[LayerWidth], goal: float) -> None:
    """Take the steps with the lowest scores until `goal` parameters are gone.

    A layer whose next step would remove too much stays as it is, and cheaper ones go on. What is then still to be
    removed is less than any step costs, and the cheapest step is still taken if that comes nearer to the goal.
    """
    removable = sum(layer.unit_params * (layer.widths[0] - layer.widths[-1]) for layer in layers)
    if goal > removable:
        amount = f"sparsity={config.sparsity}" if config.widths is None else f"widths={config.widths}"
        raise StructPruneError(
            f"{amount} asks for {goal:,.0f} parameters to go, and the layers, of which each keeps {LEAST_KEPT:.0%} of "
            f"its units, give at most {removable:,}; ask for less."
        )
    stopped = set[int]()
    for _, number in sorted((score, number) for number, layer in enumerate(layers) for score in layer.scores):
        layer = layers[number]
        if number in stopped or layer.cost > goal:
            stopped.add(number)
        else:
            goal -= layer.cost
            layer.at += 1
    cheapest = min((one for one in layers if one.at < len(one.scores)), key=lambda one: one.cost, default=None)
    if cheapest is not None and cheapest.cost < 2 * goal:
        cheapest.at += 1


def _within_budget(
    config: StructPruneConfig, arch: ArchSpec, model: PreTrainedModel, legal: LegalWidths, scores: Scores | None
) -> Widths:
    """Finds the largest widths that keep to a budget, to within the cheapest step."""
    budget = budget_of(config, arch, model, legal)
    cost, dense, limit = budget.cost, budget.dense, budget.limit
    if budget.name == CACHE:
        saves = [kind for kind in legal if cost(smallest_widths(config, arch, {kind: legal[kind]})) < dense]
        legal = {kind: legal[kind] for kind in saves}
    check_may_differ(config, arch, list(legal))
    smallest = smallest_widths(config, arch, legal)
    check_reach(config, budget, cost(smallest), list(legal), arch)

    best = _filled_up(smallest, config, arch, legal, budget)
    # A bisection over the number of parameters to remove, until the bounds are closer than what goes with a unit. The
    # widths for a number lie on either side of it, so the largest that fit are not always those for the smallest one.
    too_little, enough = 0.0, float(removed_parameters(arch, smallest))
    cheapest = min(space.unit_params * space.scale for name in legal for space in arch.of(name))
    trial = enough * (dense - limit) / (dense - cost(smallest))
    while enough - too_little > cheapest / 2:
        by_sparsity = replace(config, budget=None, targets=tuple(legal), sparsity=trial / sum(arch.layer_params))
        widths = target_widths(by_sparsity, arch, legal, scores)
        if cost(widths) <= limit:
            enough, best = trial, max(_filled_up(widths, config, arch, legal, budget), best, key=cost)
        else:
            too_little = trial
        trial = (too_little + enough) / 2
    return best


def _filled_up(
    widths: Widths, config: StructPruneConfig, arch: ArchSpec, legal: LegalWidths, budget: Budget
) -> Widths:
    """Larger widths where they still fit: a coarse step of one space may leave room for a finer one of another."""
    filled = dict(widths)
    for name, width in widths.items():
        if isinstance(width, int):
            may = choices(config, arch, name, legal[name])
            # What fits comes first: a larger width never takes less.
            larger = bisect_right(may, width)
            fitting = bisect_right(may, budget.limit, larger, key=lambda more: budget.cost({**filled, name: more}))
            filled[name] = may[fitting - 1] if fitting > larger else width
    return filled


class Budget(NamedTuple):
    """A limit on one figure of a model."""

    name: str  # of the figure, such as `parameters`
    limit: float
    dense: float  # the figure of the dense model
    cost: Callable[[Widths], float]  # that of a model with given widths


def budget_of(config: StructPruneConfig, arch: ArchSpec, model: PreTrainedModel, names: Collection[str]) -> Budget:
    """The budget of a config for spaces with these `names`; a number below 1 is a share of the dense figure."""
    ((name, limit),) = (config.budget or {}).items()
    cost_of = _cost_of(name, arch, model, names)
    costs: dict[str, float] = {}

    def cost(widths: Widths) -> float:  # a search asks for few widths many times, each at the price of a skeleton
        asked = repr(sorted(widths.items()))
        if asked not in costs:
            costs[asked] = cost_of(widths)
        return costs[asked]

    dense = cost({})
    return Budget(name, limit if limit >= 1 else int(limit * dense), dense, cost)


def check_reach(config: StructPruneConfig, budget: Budget, least: float, names: list[str], arch: ArchSpec) -> None:
    """Refuse a budget met by the dense model, or below the `least` that is left of the spaces `names`."""
    name, limit, dense, _ = budget
    if limit >= dense:
        raise StructPruneError(f"budget {name}={limit:,} is met by the dense model, with {dense:,}; ask for less.")
    kinds = ("attention", LAYER) if name == CACHE else (VOCAB, *arch.channels, "attention", LAYER)
    others = [kind for kind in kinds if kind in arch.offered and kind not in (*names, *config.targets_or_default)]
    if not names:
        advice = f"target {' or '.join(map(repr, others))}" if others else "budget something else"
        raise StructPruneError(
            f"budget {name}={limit:,} is not met by the dense model, which has {dense:,}, and targets="
            f"{list(config.targets_or_default)} leave that as it is; {advice}."
        )
    if limit < least:
        beside = ", ".join(repr(kind) for kind in others if kind != LAYER)
        advice = f", or add targets: {beside}" * bool(beside) + f", or target {LAYER!r} alone" * (LAYER in others)
        raise StructPruneError(
            f"budget {name}={limit:,} cannot be met: with all that may go from {', '.join(names)} the model still has "
            f"{least:,} of {dense:,}; allow that{advice}{'; a share of the dense model lies below 1' * (limit < 101)}."
        )


def _cost_of(name: str, arch: ArchSpec, model: PreTrainedModel, names: Collection[str]) -> Callable[[Widths], float]:
    """A function from widths to the figure of this name that a budget limits."""
    if name in ("parameters", "bytes"):
        size = model.dtype.itemsize if name == "bytes" else 1
        # What is tied has come apart in an offloaded model, and would count twice.
        dense = (shrunk_skeleton(model, arch, {}) if is_offloaded(model) else model).num_parameters()
        if any(space.layer == MODEL for kind in names for space in arch.of(kind)):
            # Such a space also has parameters outside of the layers, which its `unit_params` leave out.
            return lambda widths: size * shrunk_skeleton(model, arch, widths).num_parameters()
        return lambda widths: size * (dense - removed_parameters(arch, widths))
    from ..forward.generation import cached_values

    def cost(widths: Widths) -> float:
        if values := cached_values(shrunk_skeleton(model, arch, widths), arch):
            return model.dtype.itemsize * values
        raise StructPruneError(
            f"The {name} of this {arch.model_type} model are not known: it does not generate, or does not run without "
            "weights; give the budget in parameters or bytes."
        )

    return cost


def removed_parameters(arch: ArchSpec, widths: Widths) -> int:
    """The number of parameters that the layers lose at given widths."""
    spaces = (*arch.model_spaces, *arch.spaces)
    return sum((space.width - space.width_in(widths)) * space.scale * space.unit_params for space in spaces)
