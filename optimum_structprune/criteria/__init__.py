"""Scores: weights and moments in, one number per unit out (higher = keep). `saving` and what lies above may import it."""

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
