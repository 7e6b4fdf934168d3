"""Criteria: they turn weights and moments into one score per unit (higher = keep)."""

from .base import CRITERIA, Criterion, per_unit, register_criterion
from .flap import Flap
from .magnitude import Magnitude
from .obs import OptimalBrainSurgeon
from .random import Random
from .taylor import Taylor
from .wanda import Wanda


__all__ = [
    "CRITERIA",
    "Criterion",
    "Flap",
    "Magnitude",
    "OptimalBrainSurgeon",
    "Random",
    "Taylor",
    "Wanda",
    "per_unit",
    "register_criterion",
]
