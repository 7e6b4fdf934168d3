"""Limits on figures of a model, such as its parameters, its cache or its file, which are functions of its shape."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from transformers import PreTrainedModel

from ..arch.load import describe
from ..arch.meta import is_offloaded, shrunk_skeleton
from ..arch.spec import EXPERT, LAYER, MODEL, VOCAB, ArchSpec, Space, Widths
from ..config.pruning import ACTIVE, CACHE, SPEED, StructPruneConfig
from ..system.errors import StructPruneError, capitalized
from ..system.registry import Registry
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


class Figure(NamedTuple):
    """A figure of a model, as a function of its shape.

    Attributes:
        of: A function from widths to the figure of a model with these widths: computed, measured or predicted. A
            smaller figure is better.
        text: A function that returns a figure as text, with its unit.
        correct: A function that measures a shape, corrects the predictions by it, and returns whether they have
            changed. Its arguments are the widths and the limit. None for a figure that is computed.
    """

    of: Callable[[Widths], float]
    text: Callable[[float], str] = "{:,}".format
    correct: Callable[[Widths, float], bool] | None = None

    def after(self, removed: Widths) -> Figure:
        """Return the figure of the shapes that have some of their widths already."""
        correct = self.correct
        correct_rest = None
        if correct is not None:

            def correct_rest(widths: Widths, limit: float) -> bool:
                return correct({**removed, **widths}, limit)

        return Figure(lambda widths: self.of({**removed, **widths}), self.text, correct_rest)


@dataclass(frozen=True)
class Shapes:
    """The shapes that a pruning may give to a model.

    Attributes:
        config: The config of the pruning.
        arch: The description of the model.
        model: The model, with or without weights.
        names: The spaces that may shrink.
        order: The ids of all tokens, or None before text has ranked them. A smaller model keeps the first of them.
    """

    config: StructPruneConfig
    arch: ArchSpec
    model: PreTrainedModel
    names: Collection[str]
    order: Sequence[int] | None = None

    def skeleton(self, widths: Widths) -> PreTrainedModel:
        """Return the model with these widths, without weights."""
        return shrunk_skeleton(self.model, self.arch, widths)


# The functions that return the figure of shapes, by the names that `config.pruning.BUDGETS` lists. Figures that need
# more than the modules below this one are registered by their own modules, which `pruning.request` imports.
FIGURES: Registry[Callable[[Shapes], Figure]] = Registry("figure", "optimum_structprune.figures")


@dataclass(frozen=True)
class Budget:
    """Limits on one or several figures of a model.

    Several figures are compared as one, the cost: the figure with the largest share of its limit, in units of the
    first figure. So the cost is within `limit` if all figures are within their limits.

    Args:
        limits: The largest allowed figures by name, such as `parameters`.
        functions: The figures by name, as functions of the shape.
    """

    limits: Mapping[str, float]
    functions: Mapping[str, Figure]
    _known: dict[tuple[str, str], float] = field(default_factory=dict, init=False, repr=False)

    @property
    def limit(self) -> float:
        """Return the limit of the cost."""
        return next(iter(self.limits.values()))

    @property
    def original(self) -> float:
        """Return the cost of the original model."""
        return self.cost({})

    def figures(self, widths: Widths) -> Mapping[str, float]:
        """Return the figures of a model with these widths, by name."""
        return {name: self._figure(name, widths) for name in self.functions}

    def _figure(self, name: str, widths: Widths) -> float:
        """Return one figure of a model with these widths."""
        figure = self.functions[name]
        if figure.correct is not None:
            return figure.of(widths)

        # A search needs the same figures many times, and computing them builds a model without weights.
        key = (name, repr(sorted(widths.items())))
        if key not in self._known:
            self._known[key] = figure.of(widths)
        return self._known[key]

    def correct(self, widths: Widths) -> bool:
        """Measure a shape where figures were predicted, and return whether the predictions have changed."""
        changes = []
        for name, figure in self.functions.items():
            if figure.correct is not None:
                changes.append(figure.correct(widths, self.limits[name]))
        return any(changes)

    def after(self, removed: Widths) -> Budget:
        """Return the budget of the other spaces of a model that has some of its widths already."""
        return Budget(self.limits, {name: figure.after(removed) for name, figure in self.functions.items()})

    def cost(self, widths: Widths) -> float:
        """Return the cost of a model with these widths."""
        figures = self.figures(widths)
        if len(figures) == 1:
            return next(iter(figures.values()))
        return max(figure / self.limits[name] for name, figure in figures.items()) * self.limit

    def text(self, name: str, figure: float) -> str:
        """Return a figure as text, with its unit."""
        return self.functions[name].text(figure)

    def label(self, name: str) -> str:
        """Return a limit as text, such as `parameters=1,000`."""
        return f"{name}={self.text(name, self.limits[name])}"


def budget_of(
    config: StructPruneConfig,
    arch: ArchSpec,
    model: PreTrainedModel,
    names: Collection[str],
    order: Sequence[int] | None = None,
) -> Budget:
    """Return the budget of a config; see `Shapes`.

    A limit below 1 is a share of the original figure. The figure of a speed-up is the time relative to the original.
    """
    shapes = Shapes(config, arch, model, names, order)
    functions = {name: FIGURES.get(name)(shapes) for name in config.budget or {}}
    budget = Budget({}, functions)

    limits = {}
    for name, limit in (config.budget or {}).items():
        limits[name] = limit
        if name == SPEED:
            limits[name] = 1 / limit
        elif limit < 1:
            limits[name] = int(limit * budget.figures({})[name])
    return replace(budget, limits=limits)


@FIGURES.register("parameters")
def _parameters(shapes: Shapes) -> Figure:
    """Return the number of parameters."""
    return _size_figure(shapes, lambda model: model.num_parameters(), 1)


@FIGURES.register("bytes")
def _bytes(shapes: Shapes) -> Figure:
    """Return the bytes of the parameters and of the saved buffers in the dtype of the model."""
    itemsize = shapes.model.dtype.itemsize
    return _size_figure(shapes, lambda model: saved_bytes(model, itemsize), itemsize)


@FIGURES.register(ACTIVE)
def _active_parameters(shapes: Shapes) -> Figure:
    """Return the number of parameters that a token runs through."""
    active_shares = _active_shares(shapes.arch)
    if not active_shares:
        raise StructPruneError(
            f"The description of this {shapes.arch.model_type} model has no experts of which a token chooses some. "
            f"Replace {ACTIVE!r} by 'parameters' in `budget`."
        )

    def size(model: PreTrainedModel) -> float:
        return active_parameters(model, describe(model, shapes.config.arch_file))

    return _size_figure(shapes, size, 1, active_shares)


def _size_figure(
    shapes: Shapes,
    size: Callable[[PreTrainedModel], float],
    size_per_parameter: int,
    active_shares: Mapping[str, float] | None = None,
) -> Figure:
    """Return a size that is proportional to the number of parameters inside the layers."""
    arch = shapes.arch
    # The `unit_params` of such a space do not include parameters outside of the layers.
    kinds_of_model = {space.kind for space in arch.model_spaces if space.layer == MODEL}
    if not kinds_of_model.isdisjoint(shapes.names):
        return Figure(lambda widths: size(shapes.skeleton(widths)))

    # The tied parameters of an offloaded model are separate tensors, and would count twice.
    model = shapes.model
    if is_offloaded(model):
        model = shapes.skeleton({})
    original_size = size(model)
    return Figure(lambda widths: original_size - size_per_parameter * removed_parameters(arch, widths, active_shares))


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


@FIGURES.register(CACHE)
def _cache(shapes: Shapes) -> Figure:
    """Return the bytes of the cache per token."""
    from ..arch.generation import cached_values

    def cost(widths: Widths) -> float:
        values = cached_values(shapes.skeleton(widths), shapes.arch)
        if values:
            return shapes.model.dtype.itemsize * values
        raise StructPruneError(
            f"The {CACHE} of this {shapes.arch.model_type} model are not known: it does not generate, or does not run "
            "without weights. Set the budget in parameters or bytes."
        )

    return Figure(cost)


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
        labels = " and ".join(budget.label(name) for name in budget.limits)
        verb = "are" if len(original) > 1 else "is"
        sizes = " and ".join(budget.text(name, figure) for name, figure in original.items())
        raise StructPruneError(
            f"budget {labels} {verb} met by the original model, with {sizes}. Set a smaller budget."
        )

    is_met = all(figure <= budget.limits[name] for name, figure in budget.figures(smallest).items())
    if not is_met:
        budget.correct(smallest)

    for name, figure in budget.figures(smallest).items():
        if figure > budget.limits[name]:
            _refuse_limit(config, budget, name, smallest, names, arch)


def _refuse_limit(
    config: StructPruneConfig, budget: Budget, name: str, smallest: Widths, names: list[str], arch: ArchSpec
) -> None:
    """Raise, because the smallest widths do not meet one limit."""
    label = f"budget {budget.label(name)}"
    original = budget.text(name, budget.figures({})[name])
    remaining = budget.text(name, budget.figures(smallest)[name])
    untargeted = _untargeted_spaces(config, name, names, arch)
    if not names:
        advice = "budget something else"
        if untargeted:
            advice = f"target {' or '.join(repr(kind) for kind in untargeted)}"
        raise UnreachableBudgetError(
            f"{label} is not met by the original model, which has {original}, and targets="
            f"{list(config.targets_or_default)} do not change that. {capitalized(advice)}.",
            advice,
        )

    advice = ", or ".join(_advice(untargeted))
    suggestion = ""
    if advice:
        suggestion = f", or {advice}"
    size = f"still has {remaining} of {original}. Allow that"
    if name == SPEED:
        size = f"is {remaining} as fast. Ask for that"
    raise UnreachableBudgetError(
        f"{label} cannot be met: with the smallest widths of {', '.join(names)} the model {size}{suggestion}.",
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
