"""Criteria: they turn weights and moments into one score per unit (higher = keep)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from ..arch.spec import ArchSpec, Space
from ..method.calibrate import Moments
from ..method.score import SCORES, per_unit
from ..registry import Registry


class Criterion(ABC):
    """Scores the units of a space by the weights that consume them and by the moments of what these weights consume.

    Args:
        config: The config of the run, for the options that a criterion reads, such as `damping` or `seed`.

    Attributes:
        needs_gram: Whether `score` reads `moments.gram`; without it only mean and second moment are gathered.
        damped: Whether `score` damps a Gram matrix by `config.damping`.
        whole_model_statistics: A function of the model, its description and the calibration data, which runs the
            whole model before each round and gives one tensor per consumer, by module, shape `(domains, n)`, fp64, of
            which the mean by the weights of the domains becomes `moments.prior`; None where nothing does.
    """

    needs_gram: ClassVar[bool] = False
    damped: ClassVar[bool] = False
    whole_model_statistics: ClassVar[Callable[..., dict[str, Tensor]] | None] = None

    def __init__(self, config: Any):
        self.config = config

    @classmethod  # noqa: B027  # most refuse nothing
    def check(cls, config: Any, arch: ArchSpec, use: str) -> None:
        """Refuse what the criterion cannot score, before any text is read; here nothing.

        Args:
            config: The config of the run.
            arch: The description of the model.
            use: What the model is for: "prune", "dry run" or "trainer".

        Raises:
            StructPruneError: If the criterion cannot score this; the message proposes another one.
        """

    @abstractmethod
    def score(self, weight: Tensor, moments: Moments, columns_per_unit: int) -> Tensor:
        """One score per unit, higher = keep.

        Args:
            weight: The weight of the consumer, shape `(out, units * columns_per_unit)`, fp32.
            moments: The moments of the consumer's input, with `units * columns_per_unit` components.
            columns_per_unit: The number of columns that a unit owns.

        Returns:
            The scores, shape `(units,)`.
        """

    def prior(self, model: nn.Module, arch: ArchSpec, space: Space) -> Tensor | None:
        """What the weights alone say of each component of the consumers' inputs, shape `(n,)`, which becomes
        `moments.prior`; here nothing.

        Args:
            model: The model that is pruned.
            arch: Its description.
            space: The space whose units are scored.
        """
        return None

    def refine_selection(
        self, keep: tuple[int, ...], removed: Sequence[int], weight: Tensor, moments: Moments, columns_per_unit: int
    ) -> tuple[int, ...]:
        """The units to keep, where a set of units is judged otherwise than by the sum of their scores.

        Args:
            keep: The units with the highest scores, ascending.
            removed: The units that would go.
            weight: The dense weight of the consumer, shape `(out, n)`, fp32.
            moments: The moments of its input, of the domain mixture.
            columns_per_unit: The number of columns that a unit owns.

        Returns:
            As many units, ascending; here those with the highest scores.
        """
        return keep

    def unfitted_weight(self, weight: Tensor, moments: Moments) -> Tensor:
        """The weight whose kept columns stay as they are with `refit="none"`; here the dense one.

        Args:
            weight: The dense weight of the consumer, shape `(out, n)`, fp32.
            moments: The moments of its input, of the domain mixture.
        """
        return weight


CRITERIA: Registry[type[Criterion]] = Registry("criterion", "optimum_structprune.criteria")


def register_criterion(name: str, **attributes: Any) -> Callable[[Any], Any]:
    """Give a decorator that enters a criterion under a name: a subclass of `Criterion`, or a score function.

    Args:
        name: The name that `StructPruneConfig.criterion` takes.
        attributes: Attributes and methods of the criterion that a function becomes, such as `needs_gram=True`; the
            function is `(weight, moments, columns_per_unit, options)`, see `method.score`.

    Raises:
        StructPruneError: If the name is empty, or already stands for another criterion.
    """

    register = CRITERIA.register(name)  # which refuses names that are none, before there is a criterion

    def enter(criterion: Any) -> Any:
        register(criterion if isinstance(criterion, type) else _class_of(criterion, attributes))
        return criterion

    return enter


def _class_of(score: Callable[..., Tensor], attributes: dict[str, Any]) -> type[Criterion]:
    """The criterion whose scores are those of a function."""

    def method(self: Criterion, weight: Tensor, moments: Moments, columns_per_unit: int) -> Tensor:
        return score(weight, moments, columns_per_unit, self.config)

    own = {name: staticmethod(value) if callable(value) else value for name, value in attributes.items()}
    names = {"__doc__": score.__doc__, "__module__": score.__module__, "__qualname__": score.__qualname__}
    return type(score.__name__, (Criterion,), {**names, **own, "score": method})


for _name, (_score, _attributes) in SCORES.items():
    register_criterion(_name, **_attributes)(_score)


__all__ = ["CRITERIA", "Criterion", "per_unit", "register_criterion"]
