"""Choose the final widths: from the config, by a sparsity, by one ranking of all units, or within a budget."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import fmean
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..arch.shrink import shrunk_config
from ..arch.spec import LAYER, ArchSpec, Width, Widths
from ..config.pruning import ACTIVE, CACHE, SPEED, StructPruneConfig
from ..system.errors import StructPruneError
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


# The largest number of shapes that are measured to correct a predicted figure.
MOST_CORRECTIONS = 3
# The scores of units by layer and kind of space, shape `(width,)`.
Scores = Mapping[tuple[int, str], Tensor]


def widths_of(
    config: StructPruneConfig,
    arch: ArchSpec,
    model: PreTrainedModel,
    scores: Scores | None = None,
    budget: Budget | None = None,
) -> Widths:
    """Return the final widths of a config.

    Args:
        config: The config.
        arch: The description of the model.
        model: The model, with or without weights.
        scores: The scores that rank the units, if layers get their own widths.
        budget: The budget that these spaces share; by default the budget of the config.

    Raises:
        StructPruneError: If the widths are not legal, or if the model cannot lose as much as the config asks for.
    """
    legal = legal_widths(config, arch, model.config)
    if config.budget is None:
        widths = target_widths(config, arch, legal, scores)
    else:
        budget = budget or budget_of(config, arch, model, legal)
        widths = _within_budget(config, arch, legal, scores, budget)
        for _ in range(MOST_CORRECTIONS):
            if not budget.correct(widths):
                break
            widths = _within_budget(config, arch, legal, scores, budget)

    # Each width is legal by itself, but the config class may not accept all of them together.
    shrunk_config(model.config, arch, widths)
    return widths


def target_widths(config: StructPruneConfig, arch: ArchSpec, legal: LegalWidths, scores: Scores | None) -> Widths:
    """Return the final width of each space: one number, or one number per layer if layers may differ."""
    names = list(legal)
    config_widths = asked_widths(config, arch)
    has_same_layers = has_one_width(arch, legal)
    _check_layers_alone(arch, legal, config_widths, has_same_layers)
    check_may_differ(config, arch, names)

    pruned = without_layers(arch, config.skip_layers, legal)
    if is_bounded(config, arch, names):
        return ranked_widths(config, pruned, legal, scores or {})

    if config_widths is None:
        round_to = {name: multiple_of(config, pruned, name) for name in legal}
        widths: Widths = widths_for_sparsity(pruned, config.sparsity or 0.0, legal, round_to)
    else:
        widths = config_widths

    if config.skip_layers or not has_same_layers:
        return {name: at_most(width, pruned.of(name)) for name, width in widths.items()}
    return widths


def _check_layers_alone(
    arch: ArchSpec, legal: LegalWidths, config_widths: Widths | None, has_same_layers: bool
) -> None:
    """Raise if whole layers and other units are removed, and the layers differ before or after the pruning."""
    if LAYER not in legal or len(legal) == 1:
        return

    keeps_same_layers = all(isinstance(width, int) for width in (config_widths or {}).values())
    if has_same_layers and keeps_same_layers:
        return

    verb = "differ"
    if has_same_layers:
        verb = "would differ"
    raise StructPruneError(
        f"The layers of this {arch.model_type} model {verb} in width, and pruning {LAYER!r} would renumber them. "
        f"Prune {LAYER!r} in a separate run."
    )


def widths_for_sparsity(
    arch: ArchSpec, sparsity: float, legal: LegalWidths, round_to: Mapping[str, int]
) -> dict[str, int]:
    """Return widths that remove a share of the layers' parameters.

    Spaces are processed by the cost of their units, the largest first. Each space gets the smallest legal width that
    is not below its proportional share, or a smaller width if the remaining spaces could not remove the remaining
    parameters. The last space is rounded to the nearest width.

    Args:
        arch: The description of the model.
        sparsity: The share of the layers' parameters to remove.
        legal: The legal widths of the spaces to prune.
        round_to: The number whose multiples are chosen, by space.

    Raises:
        StructPruneError: If the spaces do not have that many parameters to remove.
    """
    options = []
    for name in legal:
        spaces = arch.of(name)
        size = spaces[0].size
        unit_params = sum(space.unit_params * space.scale for space in spaces)
        options.append(SpaceOptions(name, size, unit_params, multiples(legal[name], size, round_to[name])))

    remaining_goal = sparsity * sum(arch.layer_params)
    _check_removable(arch, sparsity, remaining_goal, options)

    options.sort(key=lambda option: -option.unit_params)
    widths: dict[str, int] = {}
    for index, option in enumerate(options):
        width = _proportional_width(option, options[index + 1 :], remaining_goal)
        widths[option.name] = width
        remaining_goal -= option.removed_params(width)
    return widths


class SpaceOptions(NamedTuple):
    """The widths to choose from for one kind of space.

    Attributes:
        name: The kind of space.
        size: The number of units.
        unit_params: The number of parameters of one unit, over all layers.
        widths: The widths, ascending.
    """

    name: str
    size: int
    unit_params: int
    widths: Sequence[int]

    def removed_params(self, width: int) -> int:
        """Return the number of parameters that a width removes."""
        return self.unit_params * (self.size - width)

    @property
    def removable_params(self) -> int:
        """Return the largest number of parameters that can be removed."""
        return self.removed_params(self.widths[0])


def _proportional_width(option: SpaceOptions, later_options: Sequence[SpaceOptions], goal: float) -> int:
    """Return the width of a space when `goal` parameters are removed from it and from the later spaces together."""
    all_params = option.unit_params * option.size
    all_params += sum(later.unit_params * later.size for later in later_options)
    ideal_width = option.size * (1 - goal / all_params)
    index = bisect_left(option.widths, ideal_width)

    if not later_options:
        nearest = option.widths[max(index - 1, 0) : index + 1]
        return min(nearest, key=lambda width: abs(width - ideal_width))

    # The later spaces must be able to remove the remaining parameters.
    removable_later = float(sum(later.removable_params for later in later_options))

    def remaining(width: int) -> float:
        return goal - option.removed_params(width)

    max_index = bisect_right(option.widths, removable_later, key=remaining) - 1
    return option.widths[min(index, max_index)]


def _check_removable(arch: ArchSpec, sparsity: float, goal: float, options: Sequence[SpaceOptions]) -> None:
    """Raise if the spaces have fewer parameters to remove than the goal."""
    total = sum(option.removable_params for option in options)
    if goal <= total:
        return

    names = [option.name for option in options]
    kinds = list(arch.channels)
    kinds.append("attention")
    untargeted = [repr(kind) for kind in kinds if kind in arch.names and kind not in names]

    advice = ""
    if untargeted:
        advice = f", or add targets: {', '.join(untargeted)}"
    raise StructPruneError(
        f"sparsity={sparsity} is too large. At most {total / sum(arch.layer_params):.3f} of the layers' parameters "
        f"can be removed from {', '.join(names)}. Lower it{advice}."
    )


@dataclass
class LayerWidth:
    """The width of one kind of space in one layer, which shrinks step by step.

    Args:
        layer: The index of the layer.
        widths: All possible widths, descending.
        unit_params: The number of parameters of one unit.
        scores: The mean score of the units that each step removes.
        step: The number of steps so far, the index of the current width.
    """

    layer: int
    widths: Sequence[int]
    unit_params: int
    scores: Sequence[float]
    step: int = 0

    @property
    def width(self) -> int:
        """Return the current width."""
        return self.widths[self.step]

    @property
    def is_narrowest(self) -> bool:
        """Return whether the current width is the smallest one."""
        return self.step == len(self.scores)

    @property
    def cost(self) -> int:
        """Return the number of parameters that the next step removes."""
        return self.unit_params * (self.widths[self.step] - self.widths[self.step + 1])


def ranked_widths(
    config: StructPruneConfig, arch: ArchSpec, legal: LegalWidths, scores: Scores
) -> dict[str, dict[int, int]]:
    """Return widths by kind of space and layer, from one ranking of all units by their scores.

    With `sparsity`, all spaces are ranked together. With `widths`, each width is the mean over the layers. The result
    differs from the goal by at most half of the cheapest step.
    """
    by_kind = {name: _layer_widths(config, arch, name, legal[name], scores) for name in legal}

    if config.widths is None:
        all_layers: list[LayerWidth] = []
        for layers in by_kind.values():
            all_layers.extend(layers)
        _remove_(config, all_layers, (config.sparsity or 0.0) * sum(arch.layer_params))
    else:
        for name, width in config.widths.items():
            # The config accepts widths of single layers only with `allocation="uniform"`.
            assert isinstance(width, int)
            goal = sum(layer.unit_params * max(layer.widths[0] - width, 0) for layer in by_kind[name])
            _remove_(config, by_kind[name], goal)

    widths: dict[str, dict[int, int]] = {}
    for name, layers in by_kind.items():
        widths[name] = {layer.layer: layer.width for layer in layers}
    return widths


def _layer_widths(
    config: StructPruneConfig, arch: ArchSpec, name: str, legal: Sequence[int], scores: Scores
) -> list[LayerWidth]:
    """Return the full width of one kind of space in each layer, with the steps to smaller widths."""
    layers = []
    for layer, spaces in arch.by_layer(name).items():
        # All experts of a layer have the same width.
        size = spaces[0].width
        widths = candidate_widths(config, arch, spaces[0], legal)

        unit_scores = torch.arange(size) / size
        if scores:
            unit_scores = scores[layer, name].sort().values
        ascending = unit_scores.tolist()
        step_scores = []
        for width, next_width in pairwise(widths):
            step_scores.append(fmean(ascending[size - width : size - next_width]))

        unit_params = sum(space.unit_params * space.scale for space in spaces)
        layers.append(LayerWidth(layer, widths, unit_params, step_scores))

    return layers


def _remove_(config: StructPruneConfig, layers: Sequence[LayerWidth], goal: float) -> None:
    """Take the steps with the lowest scores until `goal` parameters are removed.

    If the next step of a layer would remove too many parameters, the layer keeps its width, and cheaper steps of other
    layers follow. The last step is the cheapest one, if the total is closer to the goal with it.
    """
    _check_goal(config, layers, goal)
    steps = []
    for index, layer in enumerate(layers):
        for score in layer.scores:
            steps.append((score, index))

    finished = set[int]()
    for _, index in sorted(steps):
        layer = layers[index]
        if index in finished or layer.cost > goal:
            finished.add(index)
        else:
            goal -= layer.cost
            layer.step += 1

    wider_layers = [layer for layer in layers if not layer.is_narrowest]
    if wider_layers:
        cheapest = min(wider_layers, key=lambda layer: layer.cost)
        if cheapest.cost < 2 * goal:
            cheapest.step += 1


def _check_goal(config: StructPruneConfig, layers: Sequence[LayerWidth], goal: float) -> None:
    """Raise if the layers have fewer parameters to remove than the goal."""
    removable = sum(layer.unit_params * (layer.widths[0] - layer.widths[-1]) for layer in layers)
    if goal <= removable:
        return

    setting = f"widths={config.widths}"
    if config.widths is None:
        setting = f"sparsity={config.sparsity}"
    raise StructPruneError(
        f"{setting} asks to remove {goal:,.0f} parameters, but at most {removable:,} can be removed, because each "
        f"layer keeps {LEAST_KEPT:.0%} of its units. Ask for less."
    )


def _within_budget(
    config: StructPruneConfig, arch: ArchSpec, legal: LegalWidths, scores: Scores | None, budget: Budget
) -> Widths:
    """Return the largest widths that meet a budget. The remaining budget is smaller than the cheapest step."""
    if not {CACHE, ACTIVE, SPEED}.isdisjoint(budget.limits):
        legal = _effective_spaces(config, arch, legal, budget)
    check_may_differ(config, arch, list(legal))

    smallest = smallest_widths(config, arch, legal)
    check_reach(config, budget, smallest, list(legal), arch)
    unit_params = []
    for name in legal:
        unit_params += [space.unit_params * space.scale for space in arch.of(name)]

    # Bisect the number of parameters to remove until the bounds are closer than one unit. The widths for a number are
    # rounded up or down, so the smallest number that meets the budget does not always have the largest widths.
    best = _filled_up(smallest, config, arch, legal, budget)
    lower = 0.0
    upper = float(removed_parameters(arch, smallest))
    trial = upper * (budget.original - budget.limit) / (budget.original - budget.cost(smallest))
    while upper - lower > min(unit_params) / 2:
        sparsity = trial / sum(arch.layer_params)
        sparsity_config = replace(config, budget=None, targets=tuple(legal), sparsity=sparsity)
        widths = target_widths(sparsity_config, arch, legal, scores)

        if budget.cost(widths) <= budget.limit:
            upper = trial
            best = max(_filled_up(widths, config, arch, legal, budget), best, key=budget.cost)
        else:
            lower = trial
        trial = (lower + upper) / 2

    return best


def _effective_spaces(config: StructPruneConfig, arch: ArchSpec, legal: LegalWidths, budget: Budget) -> LegalWidths:
    """Return the spaces whose units reduce a figure of the budget. Only some of them reduce the cache."""
    # Not every space may have widths of its own in each layer, so each space gets one width here.
    config = replace(config, allocation="uniform", skip_layers=())
    original = budget.figures({})
    effective = {}
    for name, sizes in legal.items():
        smallest = smallest_widths(config, arch, {name: sizes})
        figures = budget.figures(smallest)
        if any(figures[figure] < original[figure] for figure in original):
            effective[name] = sizes
    return effective


def _filled_up(
    widths: Widths, config: StructPruneConfig, arch: ArchSpec, legal: LegalWidths, budget: Budget
) -> Widths:
    """Increase widths as far as the budget allows.

    A space with coarse steps may leave a part of the budget for a space with fine steps.
    """
    larger_widths: dict[str, Width] = dict(widths)
    for name, width in widths.items():
        if isinstance(width, int):
            options = choices(config, arch, name, legal[name])
            larger_widths[name] = _largest_fitting(name, width, larger_widths, options, budget)
    return larger_widths


def _largest_fitting(name: str, width: int, widths: Widths, options: Sequence[int], budget: Budget) -> int:
    """Return the largest width of one space, at least `width`, that meets a budget together with the other widths."""

    def cost(larger_width: int) -> float:
        larger_widths = dict(widths)
        larger_widths[name] = larger_width
        return budget.cost(larger_widths)

    start = bisect_right(options, width)
    end = bisect_right(options, budget.limit, start, key=cost)
    if end == start:
        return width
    return options[end - 1]
