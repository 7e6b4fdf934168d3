"""Limits on the parameters, the bytes or the cache of a model."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import NamedTuple

from transformers import PreTrainedModel

from ..arch.meta import is_offloaded, shrunk_skeleton
from ..arch.spec import LAYER, MODEL, VOCAB, ArchSpec, Widths
from ..config.pruning import CACHE, StructPruneConfig
from ..errors import StructPruneError
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
    """A limit on one figure of a model."""

    name: str  # of the figure, such as `parameters`
    limit: float
    dense: float  # the figure of the dense model
    cost: Callable[[Widths], float]  # the figure of a model with given widths


def budget_of(config: StructPruneConfig, arch: ArchSpec, model: PreTrainedModel, names: Collection[str]) -> Budget:
    """Return the budget of a config for the spaces `names`. A limit below 1 is a share of the dense figure."""
    ((name, limit),) = (config.budget or {}).items()
    cost_of = _cost_of(name, arch, model, names)
    costs: dict[str, float] = {}

    def cost(widths: Widths) -> float:
        # A search asks for the same widths many times, and each figure takes a model without weights.
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

    if any(space.layer == MODEL for kind in names for space in arch.of(kind)):
        # The parameters of such a space outside of the layers are not in its `unit_params`.
        return lambda widths: size(shrunk_skeleton(model, arch, widths))

    # Tied parameters of an offloaded model are apart, and would count twice.
    dense = size(shrunk_skeleton(model, arch, {}) if is_offloaded(model) else model)
    per_parameter = itemsize if name == "bytes" else 1
    return lambda widths: dense - per_parameter * removed_parameters(arch, widths)


def _cache_of(name: str, arch: ArchSpec, model: PreTrainedModel) -> Callable[[Widths], float]:
    """Return the function from widths to the bytes of the cache per token."""
    from ..forward.generation import cached_values

    def cost(widths: Widths) -> float:
        values = cached_values(shrunk_skeleton(model, arch, widths), arch)
        if values:
            return model.dtype.itemsize * values
        raise StructPruneError(
            f"The {name} of this {arch.model_type} model are not known: it does not generate, or does not run without "
            "weights; give the budget in parameters or bytes."
        )

    return cost


def removed_parameters(arch: ArchSpec, widths: Widths) -> int:
    """Return the number of parameters that the layers lose at given widths."""
    removed = 0
    for space in list(arch.model_spaces) + list(arch.spaces):
        units = (space.width - space.width_in(widths)) * space.scale
        removed += units * space.unit_params
    return removed


def check_reach(config: StructPruneConfig, budget: Budget, least: float, names: list[str], arch: ArchSpec) -> None:
    """Raise if the dense model meets a budget, or the smallest widths of the spaces `names` do not.

    `least` is the figure of the model with these smallest widths.
    """
    name, limit, dense, _ = budget
    if limit >= dense:
        raise StructPruneError(f"budget {name}={limit:,} is met by the dense model, with {dense:,}; ask for less.")

    others = _other_spaces(config, name, names, arch)
    if not names:
        advice = "budget something else"
        if others:
            advice = f"target {' or '.join(repr(kind) for kind in others)}"
        raise UnreachableBudgetError(
            f"budget {name}={limit:,} is not met by the dense model, which has {dense:,}, and targets="
            f"{list(config.targets_or_default)} leave that as it is; {advice}.",
            advice,
        )
    if limit < least:
        advice = ", or ".join(_advice(others))
        longer = f", or {advice}" if advice else ""
        if limit < 101:
            longer += "; a share of the dense model lies below 1"
        raise UnreachableBudgetError(
            f"budget {name}={limit:,} cannot be met: with all that may go from {', '.join(names)} the model still has "
            f"{least:,} of {dense:,}; allow that{longer}.",
            advice,
        )


def _other_spaces(config: StructPruneConfig, name: str, names: list[str], arch: ArchSpec) -> list[str]:
    """Return the spaces that would also reduce a figure."""
    kinds = ["attention", LAYER]
    if name != CACHE:
        kinds = [VOCAB] + list(arch.channels) + kinds
    targeted = set(names).union(config.targets_or_default)
    return [kind for kind in kinds if kind in arch.offered and kind not in targeted]


def _advice(others: list[str]) -> list[str]:
    """List the changes of the targets that would help to meet a budget."""
    advice = []
    beside = [repr(kind) for kind in others if kind != LAYER]
    if beside:
        advice.append(f"add targets: {', '.join(beside)}")
    if LAYER in others:
        advice.append(f"target {LAYER!r} alone")
    return advice
