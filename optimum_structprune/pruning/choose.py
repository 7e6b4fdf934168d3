"""The final widths of a run."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor
from transformers import PreTrainedModel

from ..arch.spec import ArchSpec, Widths
from ..config.pruning import ALLOCATIONS
from ..forward.metrics import evaluating
from ..widths.budget import widths_of
from ..widths.shapes import Shape
from .evidence import Evidence
from .run import Run
from .search import search
from .sweep import Sweep


Scores = dict[tuple[int, str], Tensor]


def choose_shape(run: Run, widths: Widths) -> Shape:
    """The shape that a run brings its model to: the widths of its config, or where that says so, others of the same
    total from scores of all units or from measured losses.
    """
    if run.config.searches:
        return search(run)
    if run.config.allocation == "uniform":
        return Shape(widths)
    rank = ALLOCATIONS.get(run.config.allocation)
    with evaluating(run.model), run.report.timed("ranking"):
        scores = rank(run.model, run.arch, run.evidence, list(widths))
    return Shape(widths_of(run.config, run.arch, run.model, scores))


@ALLOCATIONS.register("global")
def dense_scores(model: PreTrainedModel, arch: ArchSpec, evidence: Evidence, names: Collection[str]) -> Scores:
    """Scores of all units that compare over layers and spaces, from one pass over the dense model.

    Args:
        model: The dense model, in eval mode, which stays as it is.
        arch: The description of the model.
        evidence: The samples of the run and its config.
        names: The kinds of space that shrink.

    Returns:
        By layer and name of the space, shape `(units,)`; the units with the lowest scores go first.
    """
    passes = evidence.passes(model, arch, fixed=True)
    return Sweep(model, arch, evidence.config).scores(passes, evidence.mixture, names)
