"""Choose the final widths: by a share, as given, by one ranking of all units, or the largest within a budget."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import fmean

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..arch.shrink import shrunk_config
from ..arch.spec import LAYER, ArchSpec, Width, Widths
from ..config.pruning import CACHE, StructPruneConfig
from ..errors import StructPruneError
from .budget import Budget, budget_of, check_reach, removed_parameters
from .legal import (
    LEAST_KEPT,
    LegalWidths,
    asked_widths,
    at_most,
    candidate_widths,
    check_may_differ,
    choices,
    has_one_width,
    is_bounded,
    legal_widths,
    multiple_of,
    multiples,
    smallest_widths,
    without_layers,
)


# The scores of units by layer and kind of space, shape `(width,)`.
Scores = Mapping[tuple[int, str], Tensor]


def widths_of(
    config: StructPruneConfig, arch: ArchSpec, model: PreTrainedModel, scores: Scores | None = None
) -> Widths:
    """Return the final widths of a config. `scores` rank the units where layers get widths of their own.

    Raises:
        StructPruneError: If the widths are not legal, or the model cannot lose as much as the config asks for.
    """
    legal = legal_widths(config, arch, model.config)
    if config.budget is None:
        widths = target_widths(config, arch, legal, scores)
    else:
        widths = _within_budget(config, arch, model, legal, scores)
    shrunk_config(model.config, arch, widths)  # raises for widths that are legal only one by one
    return widths


def target_widths(config: StructPruneConfig, arch: ArchSpec, legal: LegalWidths, scores: Scores | None) -> Widths:
    """Return the final width of each space: one number, or one per layer where layers may differ."""
    names = list(legal)
    asked = asked_widths(config, arch)
    has_same_layers = has_one_width(arch, legal)
    _check_layers_alone(config, arch, legal, asked, has_same_layers)
    check_may_differ(config, arch, names)

    pruned = without_layers(arch, config.skip_layers, legal)
    if is_bounded(config, arch, names):
        return ranked_widths(config, pruned, legal, scores or {})

    if asked is None:
        round_to = {name: multiple_of(config, pruned, name) for name in legal}
        widths: Widths = widths_for_sparsity(pruned, config.sparsity or 0.0, legal, round_to)
    else:
        widths = asked
    if config.skip_layers or not has_same_layers:
        return {name: at_most(width, pruned.of(name)) for name, width in widths.items()}
    return widths


def _check_layers_alone(
    config: StructPruneConfig, arch: ArchSpec, legal: LegalWidths, asked: Widths | None, has_same_layers: bool
) -> None:
    """Raise if whole layers are removed from layers that differ, or one shape is searched for them."""
    gives_numbers = all(isinstance(width, int) for width in (asked or {}).values())
    if LAYER in legal and len(legal) > 1 and not (has_same_layers and gives_numbers):
        verb = "are to differ" if has_same_layers else "differ"
        raise StructPruneError(
            f"The layers of this {arch.model_type} model {verb} in width, and {LAYER!r} would "
            f"number them anew; prune {LAYER!r} in a run of its own."
        )


def widths_for_sparsity(
    arch: ArchSpec, sparsity: float, legal: LegalWidths, round_to: Mapping[str, int]
) -> dict[str, int]:
    """Return widths that remove a share of the layers' parameters.

    Spaces are taken in the order of the cost of their units, the largest first. Each gets the smallest legal width
    that is not below its proportional share, unless the later ones could not make up for it. The last one absorbs the
    rest, to the nearest multiple of its number in `round_to`.

    Raises:
        StructPruneError: If the spaces cannot lose so much.
    """
    size = {name: arch.of(name)[0].size for name in legal}
    cost = {name: sum(space.unit_params * space.scale for space in arch.of(name)) for name in legal}
    widths_to_choose = {name: multiples(legal[name], size[name], round_to[name]) for name in legal}
    removable = {name: cost[name] * (size[name] - widths_to_choose[name][0]) for name in legal}
    goal = sparsity * sum(arch.layer_params)
    _check_removable(arch, sparsity, goal, removable)

    names = sorted(legal, key=lambda name: -cost[name])
    widths: dict[str, int] = {}
    for position, name in enumerate(names):
        later = names[position + 1 :]
        choice = widths_to_choose[name]
        ideal = size[name] * (1 - goal / sum(cost[other] * size[other] for other in [name, *later]))
        place = bisect_left(choice, ideal)
        if later:
            # The widest choice after which the later spaces can still remove the rest.
            removable_later = float(sum(removable[other] for other in later))
            widest = _widest(choice, size[name], cost[name], goal, removable_later)
            widths[name] = choice[min(place, widest)]
        else:
            nearest = choice[max(place - 1, 0) : place + 1]
            widths[name] = min(nearest, key=lambda width: abs(width - ideal))
        goal -= cost[name] * (size[name] - widths[name])
    return widths


def _widest(choice: Sequence[int], size: int, cost: int, goal: float, removable_later: float) -> int:
    """Return the index of the widest choice that leaves at most `removable_later` of a goal to be removed."""
    return bisect_right(choice, removable_later, key=lambda width: goal - cost * (size - width)) - 1


def _check_removable(arch: ArchSpec, sparsity: float, goal: float, removable: Mapping[str, int]) -> None:
    """Raise if the spaces cannot lose as many parameters as the goal."""
    total = sum(removable.values())
    if goal <= total:
        return
    others = [kind for kind in (*arch.channels, "attention") if kind in arch.names and kind not in removable]
    advice = f", or add targets: {', '.join(map(repr, others))}" if others else ""
    raise StructPruneError(
        f"sparsity={sparsity} is more than {', '.join(removable)} can give: at most "
        f"{total / sum(arch.layer_params):.3f} of the layers' parameters; lower it{advice}."
    )


@dataclass
class LayerWidth:
    """The width of one kind of space in one layer, which shrinks step by step.

    Args:
        layer: The index of the layer.
        widths: All widths that it may take, descending.
        unit_params: The number of parameters of one unit.
        scores: The mean score of the units that each step removes.
        at: The index of the present width.
    """

    layer: int
    widths: Sequence[int]
    unit_params: int
    scores: Sequence[float]
    at: int = 0

    @property
    def width(self) -> int:
        """The present width."""
        return self.widths[self.at]

    @property
    def is_narrowest(self) -> bool:
        """Whether no step is left."""
        return self.at == len(self.scores)

    @property
    def cost(self) -> int:
        """The number of parameters that the next step removes."""
        return self.unit_params * (self.widths[self.at] - self.widths[self.at + 1])


def ranked_widths(
    config: StructPruneConfig, arch: ArchSpec, legal: LegalWidths, scores: Scores
) -> dict[str, dict[int, int]]:
    """Return widths by kind of space and layer from one ranking of all units by their scores.

    With `sparsity`, spaces compete for the same parameters. With `widths`, each width is the mean over the layers. The
    goal is met to within half of the cheapest step.
    """
    by_kind = {name: _layer_widths(config, arch, name, legal[name], scores) for name in legal}
    if config.widths is None:
        all_layers = [layer for layers in by_kind.values() for layer in layers]
        _remove_(config, all_layers, (config.sparsity or 0.0) * sum(arch.layer_params))
    else:
        for name, width in config.widths.items():
            assert isinstance(width, int)  # the config refuses numbers for single layers here
            goal = sum(layer.unit_params * max(layer.widths[0] - width, 0) for layer in by_kind[name])
            _remove_(config, by_kind[name], goal)

    widths: dict[str, dict[int, int]] = {}
    for name, layers in by_kind.items():
        widths[name] = {layer.layer: layer.width for layer in layers}
    return widths


def _layer_widths(
    config: StructPruneConfig, arch: ArchSpec, name: str, legal: Sequence[int], scores: Scores
) -> list[LayerWidth]:
    """Return the widths of one kind of space in all layers, before any step."""
    layers = []
    # The experts of a layer have one width.
    for layer, spaces in arch.by_layer(name).items():
        size = spaces[0].width
        widths = candidate_widths(config, arch, spaces[0], legal)
        unit_scores = scores[layer, name].sort().values if scores else torch.arange(size) / size
        ascending = unit_scores.tolist()
        step_scores = [fmean(ascending[size - wide : size - narrow]) for wide, narrow in pairwise(widths)]
        unit_params = sum(space.unit_params * space.scale for space in spaces)
        layers.append(LayerWidth(layer, widths, unit_params, step_scores))
    return layers


def _remove_(config: StructPruneConfig, layers: Sequence[LayerWidth], goal: float) -> None:
    """Take the steps with the lowest scores until `goal` parameters are removed.

    A layer whose next step would remove too much keeps its width, and cheaper steps of other layers follow. At the end
    the cheapest step is taken if the total comes nearer to the goal by it.
    """
    _check_goal(config, layers, goal)
    steps = []
    for number, layer in enumerate(layers):
        for score in layer.scores:
            steps.append((score, number))

    finished = set[int]()
    for _, number in sorted(steps):
        layer = layers[number]
        if number in finished or layer.cost > goal:
            finished.add(number)
        else:
            goal -= layer.cost
            layer.at += 1

    remaining = [layer for layer in layers if not layer.is_narrowest]
    if remaining:
        cheapest = min(remaining, key=lambda layer: layer.cost)
        if cheapest.cost < 2 * goal:
            cheapest.at += 1


def _check_goal(config: StructPruneConfig, layers: Sequence[LayerWidth], goal: float) -> None:
    """Raise if the layers cannot lose as many parameters as the goal."""
    removable = sum(layer.unit_params * (layer.widths[0] - layer.widths[-1]) for layer in layers)
    if goal <= removable:
        return
    amount = f"sparsity={config.sparsity}" if config.widths is None else f"widths={config.widths}"
    raise StructPruneError(
        f"{amount} asks for {goal:,.0f} parameters to go, and the layers, of which each keeps {LEAST_KEPT:.0%} of "
        f"its units, give at most {removable:,}; ask for less."
    )


def _within_budget(
    config: StructPruneConfig, arch: ArchSpec, model: PreTrainedModel, legal: LegalWidths, scores: Scores | None
) -> Widths:
    """Return the largest widths that meet a budget, to within the cheapest step."""
    budget = budget_of(config, arch, model, legal)
    if budget.name == CACHE:
        legal = _spaces_with_cache(config, arch, legal, budget)
    check_may_differ(config, arch, list(legal))
    smallest = smallest_widths(config, arch, legal)
    check_reach(config, budget, budget.cost(smallest), list(legal), arch)

    # Bisect the number of parameters to remove until the bounds are closer than one unit. The widths for a number lie
    # on either side of it, so that the smallest number that fits does not always have the largest widths.
    cheapest = min(space.unit_params * space.scale for name in legal for space in arch.of(name))
    best = _filled_up(smallest, config, arch, legal, budget)
    too_little = 0.0
    enough = float(removed_parameters(arch, smallest))
    trial = enough * (budget.dense - budget.limit) / (budget.dense - budget.cost(smallest))
    while enough - too_little > cheapest / 2:
        sparsity = trial / sum(arch.layer_params)
        by_sparsity = replace(config, budget=None, targets=tuple(legal), sparsity=sparsity)
        widths = target_widths(by_sparsity, arch, legal, scores)
        if budget.cost(widths) <= budget.limit:
            enough = trial
            best = max(_filled_up(widths, config, arch, legal, budget), best, key=budget.cost)
        else:
            too_little = trial
        trial = (too_little + enough) / 2
    return best


def _spaces_with_cache(config: StructPruneConfig, arch: ArchSpec, legal: LegalWidths, budget: Budget) -> LegalWidths:
    """Return the spaces whose units reduce the cache."""
    reducing = {}
    for name, sizes in legal.items():
        smallest = smallest_widths(config, arch, {name: sizes})
        if budget.cost(smallest) < budget.dense:
            reducing[name] = sizes
    return reducing


def _filled_up(
    widths: Widths, config: StructPruneConfig, arch: ArchSpec, legal: LegalWidths, budget: Budget
) -> Widths:
    """Return larger widths where they fit: a coarse step of one space may leave room for fine steps of another."""
    filled: dict[str, Width] = dict(widths)
    for name, width in widths.items():
        if isinstance(width, int):
            filled[name] = _largest_fitting(name, width, filled, choices(config, arch, name, legal[name]), budget)
    return filled


def _largest_fitting(name: str, width: int, widths: Widths, choice: Sequence[int], budget: Budget) -> int:
    """Return the largest width of one space, at least `width`, that meets a budget beside the other widths."""
    first_larger = bisect_right(choice, width)
    end = bisect_right(choice, budget.limit, first_larger, key=lambda larger: budget.cost({**widths, name: larger}))
    return choice[end - 1] if end > first_larger else width
