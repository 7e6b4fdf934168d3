"""Limits on the parameters, the bytes or the cache of a model."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import NamedTuple

from transformers import PreTrainedModel

from ..arch.meta import is_offloaded, shrunk_skeleton
from ..arch.spec import LAYER, MODEL, VOCAB, ArchSpec, Widths
from ..config.pruning import CACHE, StructPruneConfig
from ..errors import StructPruneError, capitalized
from ..system.stages import saved_bytes


class UnreachableBudgetError(StructPruneError):
    """A budget that no widths of the targets meet.

    Args:
        message: The message.
        advice: The changes that would help.
    """

    def __init__(self, message: str, advice: str):
        super().__init__(message)
        self.advice = advice


class Budget(NamedTuple):
    """A limit on one figure of a model.

    Attributes:
        name: The name of the figure, such as `parameters`.
        limit: The largest allowed figure.
        dense: The figure of the dense model.
        cost: A function from widths to the figure of a model with these widths.
    """

    name: str
    limit: float
    dense: float
    cost: Callable[[Widths], float]


def budget_of(config: StructPruneConfig, arch: ArchSpec, model: PreTrainedModel, names: Collection[str]) -> Budget:
    """Return the budget of a config for the spaces `names`. A limit below 1 is a share of the dense figure."""
    ((name, limit),) = (config.budget or {}).items()
    cost_of = _cost_of(name, arch, model, names)
    costs: dict[str, float] = {}

    def cost(widths: Widths) -> float:
        # A search needs the same figure many times, and computing it builds a model without weights.
        key = repr(sorted(widths.items()))
        if key not in costs:
            costs[key] = cost_of(widths)
        return costs[key]

    dense = cost({})
    if limit < 1:
        limit = int(limit * dense)
    return Budget(name, limit, dense, cost)


def _cost_of(name: str, arch: ArchSpec, model: PreTrainedModel, names: Collection[str]) -> Callable[[Widths], float]:
    """Return the function from widths to the figure of this name."""
    if name == CACHE:
        return _cache_of(name, arch, model)

    itemsize = model.dtype.itemsize

    def size(model: PreTrainedModel) -> int:
        if name == "bytes":
            return saved_bytes(model, itemsize)
        return model.num_parameters()

    # The `unit_params` of such a space do not include parameters outside of the layers.
    kinds_of_model = {space.kind for space in arch.model_spaces if space.layer == MODEL}
    if not kinds_of_model.isdisjoint(names):
        return lambda widths: size(shrunk_skeleton(model, arch, widths))

    # The tied parameters of an offloaded model are separate tensors, and would count twice.
    if is_offloaded(model):
        model = shrunk_skeleton(model, arch, {})
    dense_size = size(model)
    size_per_parameter = 1
    if name == "bytes":
        size_per_parameter = itemsize
    return lambda widths: dense_size - size_per_parameter * removed_parameters(arch, widths)


def _cache_of(name: str, arch: ArchSpec, model: PreTrainedModel) -> Callable[[Widths], float]:
    """Return the function from widths to the bytes of the cache per token."""
    from ..forward.generation import cached_values

    def cost(widths: Widths) -> float:
        values = cached_values(shrunk_skeleton(model, arch, widths), arch)
        if values:
            return model.dtype.itemsize * values
        raise StructPruneError(
            f"The {name} of this {arch.model_type} model are not known: it does not generate, or does not run without "
            "weights. Set the budget in parameters or bytes."
        )

    return cost


def removed_parameters(arch: ArchSpec, widths: Widths) -> int:
    """Return the number of parameters that the layers lose at given widths."""
    num_removed = 0
    for space in arch.model_spaces + arch.spaces:
        units = (space.width - space.width_in(widths)) * space.scale
        num_removed += units * space.unit_params
    return num_removed


def check_reach(config: StructPruneConfig, budget: Budget, smallest: float, names: list[str], arch: ArchSpec) -> None:
    """Raise if the dense model meets a budget already, or if the smallest widths do not meet it.

    Args:
        config: The config.
        budget: The budget.
        smallest: The figure of the model with the smallest widths of the spaces `names`.
        names: The spaces that share the budget.
        arch: The description of the model.
    """
    label = f"budget {budget.name}={budget.limit:,}"
    if budget.limit >= budget.dense:
        raise StructPruneError(f"{label} is met by the original model, with {budget.dense:,}. Set a smaller budget.")

    untargeted = _untargeted_spaces(config, budget.name, names, arch)
    if not names:
        advice = "budget something else"
        if untargeted:
            advice = f"target {' or '.join(repr(kind) for kind in untargeted)}"
        raise UnreachableBudgetError(
            f"{label} is not met by the original model, which has {budget.dense:,}, and targets="
            f"{list(config.targets_or_default)} do not change that. {capitalized(advice)}.",
            advice,
        )

    if budget.limit < smallest:
        advice = ", or ".join(_advice(untargeted))
        suggestion = ""
        if advice:
            suggestion = f", or {advice}"
        raise UnreachableBudgetError(
            f"{label} cannot be met: with the smallest widths of {', '.join(names)} the model still has "
            f"{smallest:,} of {budget.dense:,}. Allow that{suggestion}.",
            advice,
        )


def _untargeted_spaces(config: StructPruneConfig, name: str, names: list[str], arch: ArchSpec) -> list[str]:
    """Return the spaces that the config does not target and that would also reduce a figure."""
    kinds = ["attention", LAYER]
    if name != CACHE:
        kinds = [VOCAB] + list(arch.channels) + kinds

    targeted = set(names).union(config.targets_or_default)
    return [kind for kind in kinds if kind in arch.offered and kind not in targeted]


def _advice(untargeted: list[str]) -> list[str]:
    """Return the changes of the targets that would help to meet a budget."""
    advice = []
    targets = [repr(kind) for kind in untargeted if kind != LAYER]
    if targets:
        advice.append(f"add targets: {', '.join(targets)}")
    # Whole layers cannot share a budget with other spaces.
    if LAYER in untargeted:
        advice.append(f"target {LAYER!r} alone")
    return advice
