"""The base class of all criteria."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar

from torch import Tensor, finfo, isfinite

from ..arch.spec import ArchSpec
from ..calibration.moments import Moments
from ..config.pruning import StructPruneConfig
from ..errors import StructPruneError
from ..registry import Registry


# What gives `Moments.saliency`: a function of a model, its description and the evidence of the run (see
# `pruning.evidence.Evidence`). It returns one tensor per consumer, by module, shape `(domains, n)`, fp64, of which the
# mean by the weights of the domains counts.
Saliencies = Callable[..., "dict[str, Tensor]"]


class Criterion(ABC):
    """Scores the units of a space by the weights that consume them and by the moments of what these weights consume.

    Args:
        config: The config of the run, for the options that a criterion reads, such as `damping` or `seed`.

    Attributes:
        needs_gram: Whether `score` reads `moments.gram`; without it only mean and second moment are gathered.
        needs_producer_norms: Whether `score` reads `moments.producer_norms`, see `criteria.obs.producer_norms`; it is
            None where the units are no single channels.
        watches: What runs the whole model before each round and gives `moments.saliency`; None where nothing does.
        damped: Whether `score` damps a Gram matrix by `config.damping`.
    """

    needs_gram: ClassVar[bool] = False
    needs_producer_norms: ClassVar[bool] = False
    watches: ClassVar[Saliencies | None] = None
    damped: ClassVar[bool] = False

    def __init__(self, config: StructPruneConfig):
        self.config = config

    @classmethod  # noqa: B027  # most refuse nothing
    def check(cls, config: StructPruneConfig, arch: ArchSpec, use: str) -> None:
        """Refuse what the criterion cannot score, before any text is read; here nothing.

        Args:
            config: The config of the run.
            arch: The description of the model.
            use: What the model is for: "prune", "dry run", "trainer" or "calibrate".

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

    def exchanged(
        self, keep: tuple[int, ...], others: Sequence[int], weight: Tensor, moments: Moments, columns_per_unit: int
    ) -> tuple[int, ...]:
        """The units to keep, where a set of units is judged otherwise than by the sum of their scores.

        Args:
            keep: The units with the highest scores, ascending.
            others: The units that would go.
            weight: The dense weight of the consumer, shape `(out, n)`, fp32.
            moments: The moments of its input, of the domain mixture.
            columns_per_unit: The number of columns that a unit owns.

        Returns:
            As many units, ascending; here those with the highest scores.
        """
        return keep

    def unfitted(self, weight: Tensor, moments: Moments) -> Tensor:
        """The weight whose kept columns stay as they are with `refit="none"`; here the dense one.

        Args:
            weight: The dense weight of the consumer, shape `(out, n)`, fp32.
            moments: The moments of its input, of the domain mixture.
        """
        return weight


def check_scores(scores: object, count: int, name: str, where: str) -> None:
    """Refuse what a criterion of somebody's gave, unless it is one finite number for each unit."""
    shape = tuple(getattr(scores, "shape", ()))
    kind = f"the shape {shape}" if isinstance(scores, Tensor) and shape != (count,) else "NaN or infinite values"
    if not isinstance(scores, Tensor) or scores.is_complex():
        kind = f"the {getattr(scores, 'dtype', type(scores).__name__)} {scores!r:.40}"
    elif shape == (count,) and bool(isfinite(scores).all()):
        return
    raise StructPruneError(
        f"The criterion {name!r} has to give {count} finite scores, one per unit, at {where}, as a real tensor; it "
        f"gives {kind}."
    )


def per_unit(columns: Tensor, columns_per_unit: int) -> Tensor:
    """The sum over the columns of each unit, shape `(units,)`, of values of shape `(units * columns_per_unit,)`."""
    return columns.reshape(-1, columns_per_unit).sum(1)


def standardised(columns: Tensor, columns_per_unit: int) -> Tensor:
    """Scores that can be compared over layers and spaces, shape `(units,)`: the mean z-score of a unit's columns.

    As in FLAP (An et al. 2023, section 3.3), the score of every column, shape `(units * columns_per_unit,)`, is
    standardised over the columns of its layer. It is a mean and not a sum, so that it is a score per column, and
    thereby per parameter.
    """
    spread = columns.std(correction=0).clamp(min=finfo(columns.dtype).tiny)
    return ((columns - columns.mean()) / spread).reshape(-1, columns_per_unit).mean(1)


CRITERIA: Registry[type[Criterion]] = Registry("criterion", "optimum_structprune.criteria")
register_criterion = CRITERIA.register
