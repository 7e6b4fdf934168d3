"""The final widths of a run."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from torch import Tensor
from transformers import PreTrainedModel

from ..arch.spec import ArchSpec
from ..config.pruning import ALLOCATIONS, StructPruneConfig
from ..forward.metrics import evaluating
from ..record.report import Report
from ..widths.budget import widths_of
from ..widths.shapes import Shape
from .evidence import Evidence
from .search import search
from .sweep import Sweep


Scores = dict[tuple[int, str], Tensor]


def choose_shape(
    config: StructPruneConfig, arch: ArchSpec, model: PreTrainedModel, evidence: Evidence, report: Report
) -> Shape:
    """The widths that a config asks for, from scores of all units or from measured losses where it says so."""
    if config.searches:
        return search(model, arch, config, evidence, report)
    widths = widths_of(config, arch, model)
    if config.allocation != "uniform":
        rank = ALLOCATIONS.get(config.allocation)
        with evaluating(model), report.timed("ranking"):
            scores = rank(model, arch, evidence, list(widths))
        widths = widths_of(config, arch, model, scores)
    return Shape(widths)


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
    # The dense model has no error to make up for, so there is no stream of dense hidden states to carry beside it.
    evidence = replace(evidence, config=replace(evidence.config, error_feedback=0.0))
    passes = evidence.passes(model, arch, fixed=True)
    return Sweep(model, arch, evidence.config).scores(passes, evidence.mixture, names)
