"""Criteria: they turn weights and moments into one score per unit (higher = keep)."""

from .base import CRITERIA, Criterion, per_unit, register_criterion, saliencies_for
from .ddp import LearnedGates
from .flap import Flap
from .iterative_norm import IterativeNorm
from .magnitude import Magnitude
from .obs import OptimalBrainSurgeon, ProducerBrainSurgeon
from .pip import PerturbedViews
from .random import Random
from .slimllm import SlimLLM
from .taylor import Taylor
from .wanda import Wanda


__all__ = [
    "CRITERIA",
    "Criterion",
    "ProducerBrainSurgeon",
    "Flap",
    "IterativeNorm",
    "LearnedGates",
    "Magnitude",
    "OptimalBrainSurgeon",
    "PerturbedViews",
    "Random",
    "SlimLLM",
    "Taylor",
    "Wanda",
    "per_unit",
    "register_criterion",
    "saliencies_for",
]
