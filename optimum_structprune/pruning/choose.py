"""The final widths of a run."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from ..arch.spec import ArchSpec
from ..config.pruning import StructPruneConfig
from ..forward.metrics import evaluating
from ..saving.report import Report
from ..widths.budget import widths_of
from ..widths.shapes import Shape
from .evidence import Evidence
from .search import search
from .sweep import Sweep


if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

Scores = dict[tuple[int, str], "Tensor"]


def choose_shape(
    config: StructPruneConfig, arch: ArchSpec, model: PreTrainedModel, evidence: Evidence, report: Report
) -> Shape:
    """The widths that a config asks for, from scores of all units or from measured losses where it says so.

    Args:
        config: How much to remove, and how it is spread over the layers.
        arch: The dense model.
        model: The dense model itself; it is left as it is.
        evidence: What is known of the text.
        report: Takes the time.
    """
    if config.searches:
        return search(model, arch, config, evidence, report)
    widths = widths_of(config, arch, model)
    if config.allocation == "global":
        scores = dense_scores(model, arch, config, evidence, list(widths), report)
        widths = widths_of(config, arch, model, scores)
    return Shape(widths)


def dense_scores(
    model: PreTrainedModel,
    arch: ArchSpec,
    config: StructPruneConfig,
    evidence: Evidence,
    names: Collection[str],
    report: Report,
) -> Scores:
    """Scores of all units that compare over layers and spaces, from one pass over the dense model.

    Args:
        model: The dense model; it is left as it is.
        arch: Its description.
        config: How to prune; names the criterion.
        evidence: What is known of the text.
        names: The kinds of space.
        report: Takes the time.
    """
    with evaluating(model), report.timed("ranking"):
        return Sweep(model, arch, config).scores(evidence.passes(model, arch), evidence.mixture, names)
