"""The final widths of a run."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..arch.spec import ArchSpec
from ..config.pruning import LEARNED, StructPruneConfig
from ..criteria.layers import BLOCK_INFLUENCE, LAYER_CRITERIA
from ..forward.metrics import evaluating
from ..record.report import Report
from ..widths.budget import widths_of
from ..widths.shapes import Shape
from .evidence import Evidence
from .search import search
from .sweep import Sweep


Scores = dict[tuple[int, str], "Tensor"]
# How much the ratios of layers differ with `cosine`; SlimLLM takes 10 where it removes 20 % of a model, 7 for 50 %.
SHARPNESS = 10.0


def choose_shape(
    config: StructPruneConfig, arch: ArchSpec, model: PreTrainedModel, evidence: Evidence, report: Report
) -> Shape:
    """The widths that a config asks for, from scores of all units or from measured losses where it says so."""
    if config.searches:
        return search(model, arch, config, evidence, report)
    widths = widths_of(config, arch, model)
    if config.allocation in SCORES:
        scores = SCORES[config.allocation](model, arch, config, evidence, list(widths), report)
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
    """Scores of all units that compare over layers and spaces, from one pass over the dense model."""
    # The dense model has no error to make up for, so there is no stream of dense hidden states to carry beside it.
    evidence = replace(evidence, config=replace(config, error_feedback=0.0))
    with evaluating(model), report.timed("ranking"):
        return Sweep(model, arch, config).scores(evidence.passes(model, arch, fixed=True), evidence.mixture, names)


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
        batches = evidence.own_batches
        lost = [judge.score(model, arch, [b for b in batches if b.domain == k]) for k in by_domain]
    shares = torch.tensor(evidence.shares, dtype=torch.float64)
    ratios = torch.softmax(-SHARPNESS * (shares @ torch.stack(lost)), 0)
    # Where a threshold cuts off a multiple of its ratio from every layer, the widths are in these proportions.
    return {
        (space.layer, space.name): torch.arange(space.size) / space.size / float(ratios[space.layer])
        for space in arch.spaces
        if space.kind in names
    }


def learned_scores(
    model: PreTrainedModel,
    arch: ArchSpec,
    config: StructPruneConfig,
    evidence: Evidence,
    names: Collection[str],
    report: Report,
) -> Scores:
    """The gates that were learned for one budget over all layers; see `pruning.gates`, and `dense_scores` for the
    arguments.
    """
    return dict(evidence.learned())


# What ranks the units, by allocation; `uniform` ranks none, and the others measure.
SCORES: dict[str, Callable[..., Scores]] = {
    "global": dense_scores,
    "cosine": cosine_scores,
    LEARNED: learned_scores,
}
