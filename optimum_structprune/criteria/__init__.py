"""Criteria: they turn weights and moments into one score per unit (higher = keep)."""

from .base import CRITERIA, Criterion, per_unit, register_criterion
from .obs import OptimalBrainSurgeon, ProducerBrainSurgeon
from .simple import Flap, Magnitude, Random, Wanda


__all__ = [
    "CRITERIA",
    "Criterion",
    "Flap",
    "Magnitude",
    "OptimalBrainSurgeon",
    "ProducerBrainSurgeon",
    "Random",
    "Wanda",
    "per_unit",
    "register_criterion",
]
