"""Criteria: functions that score units, whole layers or whole experts, one file for each paper.

`Criterion` in `method.loop` describes the arguments and the result of such a function. A higher score means keep.
"""

from . import block_influence, flap, magnitude, obs, obs_drive, random, reap, wanda
from .registry import CRITERIA, DEFAULT_CRITERIA, criterion_of, parameters_of, per_unit, reads_gram, register_criterion


__all__ = [
    "CRITERIA",
    "DEFAULT_CRITERIA",
    "block_influence",
    "criterion_of",
    "flap",
    "magnitude",
    "obs",
    "obs_drive",
    "parameters_of",
    "per_unit",
    "random",
    "reads_gram",
    "reap",
    "register_criterion",
    "wanda",
]
