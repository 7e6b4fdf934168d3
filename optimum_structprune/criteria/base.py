"""The base class of all criteria."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

from ..calibration.moments import Moments
from ..config.pruning import StructPruneConfig
from ..registry import Registry


class Criterion(ABC):
    """Scores the units of a space by the weights that consume them and by the moments of what these weights consume.

    Args:
        config: The config of the run, for the options that a criterion reads, such as `damping` or `seed`.

    Attributes:
        needs_gram: Whether `score` reads `moments.gram`; without it only mean and second moment are gathered.
        needs_gradient: Whether `score` reads `moments.saliency`, which takes a backward pass through the whole model.
    """

    needs_gram: ClassVar[bool] = False
    needs_gradient: ClassVar[bool] = False

    def __init__(self, config: StructPruneConfig):
        self.config = config

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


def per_unit(columns: Tensor, columns_per_unit: int) -> Tensor:
    """The sum over the columns of each unit, shape `(units,)`.

    Args:
        columns: One value per column, shape `(units * columns_per_unit,)`.
        columns_per_unit: The number of columns that a unit owns.
    """
    return columns.reshape(-1, columns_per_unit).sum(1)


CRITERIA: Registry[Criterion] = Registry("criterion", "optimum_structprune.criteria")
register_criterion = CRITERIA.register
