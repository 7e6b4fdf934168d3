"""What every criterion has in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

from ..calibration.moments import Moments
from ..config.pruning import StructPruneConfig
from ..registry import Registry


class Criterion(ABC):
    """Judges the units of a space by the weights that consume them and by the statistics of what they consume.

    Attributes:
        needs_gram: Whether `score` reads `moments.gram`; without it only mean and square are gathered.
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
            weight: The consumer, shape `(out, units * columns_per_unit)`, fp32.
            moments: Of the consumer's input, `units * columns_per_unit` components.
            columns_per_unit: Columns per unit.

        Returns:
            Shape `(units,)`.
        """


def per_unit(columns: Tensor, columns_per_unit: int) -> Tensor:
    """Sum a value per column, shape `(units * columns_per_unit,)`, over the columns of each unit."""
    return columns.reshape(-1, columns_per_unit).sum(1)


CRITERIA: Registry[Criterion] = Registry("criterion", "optimum_structprune.criteria")
register_criterion = CRITERIA.register
