"""The final widths of a run."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

import torch

from ..arch.spec import ArchSpec, Widths
from ..config.pruning import StructPruneConfig
from ..criteria.layers import BLOCK_INFLUENCE, LAYER_CRITERIA
from ..forward.metrics import evaluating
from ..saving.report import Report
from ..widths.budget import widths_of
from .evidence import Evidence
from .sensitivity import sensitivities
from .sweep import Sweep


if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

Scores = dict[tuple[int, str], "Tensor"]
# How much the ratios of layers differ with `cosine`; SlimLLM takes 10 where it removes 20 % of a model, 7 for 50 %.
SHARPNESS = 10.0


def choose_widths(
    config: StructPruneConfig, arch: ArchSpec, model: PreTrainedModel, evidence: Evidence, report: Report
) -> Widths:
    """The widths that a config asks for; where layers get widths of their own, from scores of all units.

    Args:
        config: How much to remove, and how it is spread over the layers.
        arch: The dense model.
        model: The dense model itself; it is left as it is.
        evidence: What is known of the text.
        report: Takes the time.
    """
    widths = widths_of(config, arch, model)
    if config.allocation not in SCORES:
        return widths
    scores = SCORES[config.allocation](model, arch, config, evidence, list(widths), report)
    return widths_of(config, arch, model, scores)


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


def cosine_scores(
    model: PreTrainedModel,
    arch: ArchSpec,
    config: StructPruneConfig,
    evidence: Evidence,
    names: Collection[str],
    report: Report,
) -> Scores:
    """Scores by which every layer gives up units in proportion to softmax(`SHARPNESS` · cos(input, output)).

    These are the layer ratios of SlimLLM (Guo et al., ICML 2025, arXiv 2505.22689), which has the same ones for heads
    and channels, and leaves out the layers that change the residual stream most; here all layers take part. See
    `dense_scores` for the arguments.
    """
    by_domain = range(len(evidence.domains))
    with evaluating(model), report.timed("ranking"):
        judge = LAYER_CRITERIA.get(BLOCK_INFLUENCE)()
        lost = [judge.score(model, arch, [b for b in evidence.batches if b.domain == k]) for k in by_domain]
    shares = torch.tensor(evidence.shares, dtype=torch.float64)
    ratios = torch.softmax(-SHARPNESS * (shares @ torch.stack(lost)), 0)
    # Where a threshold cuts off a multiple of its ratio from every layer, the widths are in these proportions.
    return {
        (space.layer, space.name): torch.arange(space.size) / space.size / float(ratios[space.layer])
        for space in arch.spaces
        if space.kind in names
    }


# What ranks the units, by allocation; `uniform` ranks none.
SCORES: dict[str, Callable[..., Scores]] = {
    "global": dense_scores,
    "cosine": cosine_scores,
    "sensitivity": sensitivities,
}
