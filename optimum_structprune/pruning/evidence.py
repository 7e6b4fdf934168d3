"""What a run knows of the text."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from torch import Tensor

from ..arch.spec import ArchSpec
from ..calibration.gradients import saliencies
from ..calibration.passes import Passes, batches_of, passes_over
from ..calibration.stored import Statistics, StoredPasses
from ..config.pruning import StructPruneConfig
from ..criteria.mixture import Mixture
from ..domains.load import Domain
from ..forward.clock import Clock
from ..forward.metrics import evaluating
from ..saving.report import Report
from .sweep import Sweep


if TYPE_CHECKING:
    from transformers import PreTrainedModel


def mixture(config: StructPruneConfig, domains: list[Domain]) -> Mixture:
    """How a config brings the evidence of domains together."""
    shares = tuple(domain.weight for domain in domains)
    return Mixture(shares, config.normalisation, config.aggregation, float(config.quantile))


def passes_of(sweep: Sweep, domains: list[Domain], statistics: Statistics | None, clock: Clock) -> Passes:
    """The evidence for a sweep: stored moments, or the domains run through its model as it is now.

    Args:
        sweep: Where gradients are entered, if its criterion needs them.
        domains: Calibration text.
        statistics: Stored moments of the dense model, in place of the text.
        clock: Takes the time of each domain.
    """
    model, arch, config = sweep.model, sweep.arch, sweep.config
    if statistics is not None:
        return StoredPasses(statistics, domains, sweep.criterion.needs_gradient, next(model.parameters()).device)
    batches = batches_of(domains, config.batch_size)
    if sweep.criterion.needs_gradient:
        sweep.saliency = saliencies(model, arch, batches, clock)
    error_feedback = float(config.error_feedback) if config.fits else 0.0
    return passes_over(model, arch, batches, clock, error_feedback)


def dense_scores(
    model: PreTrainedModel,
    arch: ArchSpec,
    config: StructPruneConfig,
    domains: list[Domain],
    names: Collection[str],
    report: Report,
    statistics: Statistics | None = None,
) -> dict[tuple[int, str], Tensor]:
    """Scores of all units that compare over layers and spaces, from one pass over the dense model.

    Args:
        model: It is left as it is.
        arch: Its description.
        config: Names the criterion.
        domains: Calibration text.
        names: Kinds of space.
        report: Takes the time.
        statistics: Stored moments of the model, in place of the text.
    """
    sweep = Sweep(model, arch, config, mixture(config, domains))
    clock = Clock(model.device)
    with evaluating(model), report.timed("ranking"):
        scores = sweep.scores(passes_of(sweep, domains, statistics, clock), names)
    report.note_domains(clock.seconds, [domain.name for domain in domains])
    return scores
