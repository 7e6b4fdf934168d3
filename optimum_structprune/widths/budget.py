"""Limits on the parameters, the active parameters, the bytes or the cache of a model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

from transformers import PreTrainedModel

from ..arch.load import describe
from ..arch.meta import is_offloaded, shrunk_skeleton
from ..arch.spec import EXPERT, LAYER, MODEL, VOCAB, ArchSpec, Space, Widths
from ..config.pruning import ACTIVE, CACHE, StructPruneConfig
from ..system.errors import StructPruneError, capitalized
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


@dataclass(frozen=True)
class Budget:
    """Limits on one or several figures of a model.

    Several figures are compared as one, the cost: the figure with the largest share of its limit, in units of the
    first figure. So the cost is within `limit` if all figures are within their limits.

    Args:
        limits: The largest allowed figures by name, such as `parameters`.
        figures: A function from widths to the figures of a model with these widths, by name.
    """

    limits: Mapping[str, float]
    figures: Callable[[Widths], Mapping[str, float]]

    @property
    def limit(self) -> float:
        """Return the limit of the cost."""
        return next(iter(self.limits.values()))

    @property
    def original(self) -> float:
        """Return the cost of the original model."""
        return self.cost({})

    def cost(self, widths: Widths) -> float:
        """Return the cost of a model with these widths."""
        figures = self.figures(widths)
        if len(figures) == 1:
            return next(iter(figures.values()))
        return max(figure / self.limits[name] for name, figure in figures.items()) * self.limit


def budget_of(config: StructPruneConfig, arch: ArchSpec, model: PreTrainedModel, names: Collection[str]) -> Budget:
    """Return the budget of a config for the spaces `names`. A limit below 1 is a share of the original figure."""
    functions = {name: _figure_of(name, config, arch, model, names) for name in config.budget or {}}
    known: dict[str, dict[str, float]] = {}

    def figures(widths: Widths) -> dict[str, float]:
        # A search needs the same figures many times, and computing them builds a model without weights.
        key = repr(sorted(widths.items()))
        if key not in known:
            known[key] = {name: function(widths) for name, function in functions.items()}
        return known[key]

    limits = {}
    for name, limit in (config.budget or {}).items():
        limits[name] = int(limit * figures({})[name]) if limit < 1 else limit
    return Budget(limits, figures)


def _figure_of(
    name: str, config: StructPruneConfig, arch: ArchSpec, model: PreTrainedModel, names: Collection[str]
) -> Callable[[Widths], float]:
    """Return the function from widths to the figure of this name."""
    if name == CACHE:
        return _cache_of(name, arch, model)

    itemsize = model.dtype.itemsize
    active_shares = _active_shares(arch)
    if name == ACTIVE and not active_shares:
        raise StructPruneError(
            f"The description of this {arch.model_type} model has no experts of which a token chooses some. Replace "
            f"{ACTIVE!r} by 'parameters' in `budget`."
        )

    def size(model: PreTrainedModel) -> float:
        if name == "bytes":
            return saved_bytes(model, itemsize)
        if name == ACTIVE:
            return active_parameters(model, describe(model, config.arch_file))
        return model.num_parameters()

    # The `unit_params` of such a space do not include parameters outside of the layers.
    kinds_of_model = {space.kind for space in arch.model_spaces if space.layer == MODEL}
    if not kinds_of_model.isdisjoint(names):
        return lambda widths: size(shrunk_skeleton(model, arch, widths))

    # The tied parameters of an offloaded model are separate tensors, and would count twice.
    if is_offloaded(model):
        model = shrunk_skeleton(model, arch, {})
    original_size = size(model)
    if name == ACTIVE:
        return lambda widths: original_size - removed_parameters(arch, widths, active_shares)

    size_per_parameter = 1
    if name == "bytes":
        size_per_parameter = itemsize
    return lambda widths: original_size - size_per_parameter * removed_parameters(arch, widths)


def active_parameters(model: PreTrainedModel, arch: ArchSpec) -> int:
    """Return the number of parameters that a token runs through: all but the experts that it does not choose.

    The embeddings count completely, as in NVIDIA ModelOpt.
    """
    num_active = model.num_parameters()
    for space in _expert_spaces(arch):
        weights = {axis.param for axis in space.axes if axis.param.startswith(f"{space.experts}.")}
        stored = sum(model.get_parameter(name).numel() for name in weights)
        num_active -= stored // space.size * (space.size - space.min_size)
    return num_active


def _expert_spaces(arch: ArchSpec) -> Iterator[Space]:
    """Yield the spaces of whole experts. `min_size` is the number of experts that a token chooses."""
    return (space for space in arch.spaces if space.unit == EXPERT)


def _active_shares(arch: ArchSpec) -> dict[str, float]:
    """Return the share of the experts that a token chooses, by the module of the experts."""
    return {str(space.experts): space.min_size / space.size for space in _expert_spaces(arch)}


def _cache_of(name: str, arch: ArchSpec, model: PreTrainedModel) -> Callable[[Widths], float]:
    """Return the function from widths to the bytes of the cache per token."""
    from ..arch.generation import cached_values

    def cost(widths: Widths) -> float:
        values = cached_values(shrunk_skeleton(model, arch, widths), arch)
        if values:
            return model.dtype.itemsize * values
        raise StructPruneError(
            f"The {name} of this {arch.model_type} model are not known: it does not generate, or does not run without "
            "weights. Set the budget in parameters or bytes."
        )

    return cost


def removed_parameters(arch: ArchSpec, widths: Widths, active_shares: Mapping[str, float] | None = None) -> int:
    """Return the number of parameters that the layers lose at given widths.

    With `active_shares`, only parameters that a token runs through count: none of whole experts, and of channels
    inside experts the share of the experts that a token chooses.
    """
    num_removed = 0.0
    for space in arch.model_spaces + arch.spaces:
        params = (space.width - space.width_in(widths)) * space.scale * space.unit_params
        if active_shares is None:
            num_removed += params
        elif space.unit != EXPERT:
            num_removed += params * active_shares.get(str(space.experts), 1.0)
    return round(num_removed)


def check_reach(config: StructPruneConfig, budget: Budget, smallest: Widths, names: list[str], arch: ArchSpec) -> None:
    """Raise if the original model meets a budget already, or if the smallest widths do not meet it.

    Args:
        config: The config.
        budget: The budget.
        smallest: The smallest widths of the spaces `names`.
        names: The spaces that share the budget.
        arch: The description of the model.
    """
    original = budget.figures({})
    if budget.limit >= budget.original:
        labels = " and ".join(f"{name}={limit:,}" for name, limit in budget.limits.items())
        verb = "are" if len(original) > 1 else "is"
        sizes = " and ".join(f"{figure:,}" for figure in original.values())
        raise StructPruneError(
            f"budget {labels} {verb} met by the original model, with {sizes}. Set a smaller budget."
        )

    for name, figure in budget.figures(smallest).items():
        limit = budget.limits[name]
        if figure > limit:
            _refuse_limit(config, name, limit, original[name], figure, names, arch)


def _refuse_limit(
    config: StructPruneConfig,
    name: str,
    limit: float,
    original: float,
    smallest: float,
    names: list[str],
    arch: ArchSpec,
) -> None:
    """Raise, because the smallest widths do not meet one limit."""
    label = f"budget {name}={limit:,}"
    untargeted = _untargeted_spaces(config, name, names, arch)
    if not names:
        advice = "budget something else"
        if untargeted:
            advice = f"target {' or '.join(repr(kind) for kind in untargeted)}"
        raise UnreachableBudgetError(
            f"{label} is not met by the original model, which has {original:,}, and targets="
            f"{list(config.targets_or_default)} do not change that. {capitalized(advice)}.",
            advice,
        )

    advice = ", or ".join(_advice(untargeted))
    suggestion = ""
    if advice:
        suggestion = f", or {advice}"
    raise UnreachableBudgetError(
        f"{label} cannot be met: with the smallest widths of {', '.join(names)} the model still has "
        f"{smallest:,} of {original:,}. Allow that{suggestion}.",
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
