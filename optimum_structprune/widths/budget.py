"""From the amount in a config to the final widths: those of a share or as given, or the largest within a budget."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import NamedTuple

from transformers import PreTrainedModel

from ..arch.meta import is_offloaded, shrunk_skeleton
from ..arch.shrink import shrunk_config
from ..arch.spec import LAYER, MODEL, VOCAB, ArchSpec, Widths
from ..config.pruning import CACHE, StructPruneConfig
from ..errors import StructPruneError
from .allocation import (
    LegalWidths,
    Scores,
    check_may_differ,
    choices,
    legal_widths,
    smallest_widths,
    target_widths,
    widths_by_share,
)


def widths_of(
    config: StructPruneConfig, arch: ArchSpec, model: PreTrainedModel, scores: Scores | None = None
) -> Widths:
    """The final widths, in whichever way a config says how much is removed; see `target_widths`."""
    if config.budget is None:
        return widths_by_share(config, arch, model.config, scores)
    widths = _within_budget(config, arch, model, legal_widths(config, arch, model.config), scores)
    shrunk_config(model.config, arch, widths)  # see there
    return widths


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

    def fits(widths: Widths) -> bool:
        return cost(widths) <= limit

    best = _filled_up(smallest, config, arch, legal, fits)

    # A bisection over the number of parameters to remove, until the bounds are closer than what goes with a unit. The
    # widths for a number lie on either side of it, so the largest that fit are not always those for the smallest one.
    too_little, enough = 0.0, float(removed_parameters(arch, smallest))
    cheapest = min(space.unit_params * space.scale for name in legal for space in arch.of(name))
    trial = enough * (dense - limit) / (dense - cost(smallest))
    while enough - too_little > cheapest / 2:
        by_sparsity = replace(config, budget=None, targets=tuple(legal), sparsity=trial / sum(arch.layer_params))
        widths = target_widths(by_sparsity, arch, legal, scores)
        if fits(widths):
            enough, best = trial, max(_filled_up(widths, config, arch, legal, fits), best, key=cost)
        else:
            too_little = trial
        trial = (too_little + enough) / 2
    return best


def _filled_up(
    widths: Widths, config: StructPruneConfig, arch: ArchSpec, legal: LegalWidths, fits: Callable[[Widths], bool]
) -> Widths:
    """Larger widths where they still fit: a coarse step of one space may leave room for a finer one of another."""
    filled = dict(widths)
    for name, width in widths.items():
        if isinstance(width, int):
            may = choices(config, arch, name, legal[name])
            # What fits comes first: a larger width never takes less.
            larger = bisect_right(may, width)
            fitting = bisect_left(may, True, larger, key=lambda choice: not fits({**filled, name: choice}))
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
    cost_of = _cost_of(config, arch, model, names)
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


def _cost_of(
    config: StructPruneConfig, arch: ArchSpec, model: PreTrainedModel, names: Collection[str]
) -> Callable[[Widths], float]:
    """A function from widths to the figure that the budget limits."""
    ((name, _),) = (config.budget or {}).items()
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
