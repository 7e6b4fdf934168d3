"""What takes each kind of step. All have one signature: a run and a step in, the kept units of that step out."""

from __future__ import annotations

from collections.abc import Callable

from ..arch.spec import EXPERT, HIDDEN, LAYER
from ..forward.metrics import evaluating
from ..surgery.plan import Plan
from .channels import remove_channels_
from .experts import remove_experts_
from .floor import prune_within_floor_
from .layers import remove_layers_
from .rounds import prune_units_
from .run import Run
from .steps import FLOOR, UNITS, Step


REMOVERS: dict[str, Callable[[Run, Step], Plan]] = {
    LAYER: remove_layers_,
    EXPERT: remove_experts_,
    HIDDEN: remove_channels_,
    UNITS: prune_units_,
    FLOOR: prune_within_floor_,
}


def take_(run: Run, step: Step) -> None:
    """Prune the model of a run by one step, and add to its plan what is kept."""
    with evaluating(run.model):
        run.plan = run.plan.then(REMOVERS[step.kind](run, step))
