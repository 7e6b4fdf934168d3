"""What goes before the rounds, the coarsest first: whole blocks, whole experts, channels of the residual stream."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .arch.load import describe
from .arch.shrink import shrunk_config
from .arch.spec import HIDDEN, LAYER, ArchSpec, Widths
from .calibration.evidence import Mixture
from .calibration.passes import passes_over
from .config import StructPruneConfig
from .criteria import CRITERIA
from .criteria.layers import BLOCK_INFLUENCE, LAYER_CRITERIA
from .depth import remove_layers_
from .errors import StructPruneError
from .hidden import remove_channels_
from .plan import EXPERT, Plan
from .report import Report
from .surgery import adopt_config_, skeleton
from .sweep import Sweep


if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .calibration.taps import Batch

COARSE = (LAYER, EXPERT, HIDDEN)


def check_coarse(config: StructPruneConfig, names: Sequence[str]) -> None:
    """Refuse a criterion or a refit that the spaces do not have.

    Args:
        config: Names them.
        names: Spaces that are to shrink.

    Raises:
        StructPruneError: If the criterion does not exist, or judges whole blocks where other spaces have to be judged
            too; or if the residual stream is to be refitted by biases.
    """
    others = [name for name in names if name != LAYER]
    if config.scored_by not in LAYER_CRITERIA.names():
        CRITERIA.get(config.scored_by)
    elif others:
        raise StructPruneError(
            f"criterion={config.criterion!r} judges whole blocks, and nothing inside them; prune {LAYER!r} in a run "
            f"of its own, or choose a criterion for {others[0]!r}: {LAYER!r} is judged by {BLOCK_INFLUENCE!r} then."
        )
    if config.max_perplexity_ratio is not None and (wide := [name for name in names if name in COARSE]):
        raise StructPruneError(
            f"max_perplexity_ratio is held by rounds, and {wide[0]!r} goes before them; leave either out."
        )
    if HIDDEN in names and config.refit == "bias":
        raise StructPruneError(
            f"refit='bias' needs a bias in all that reads {HIDDEN!r}; use refit='least_squares' or 'none'."
        )


def prune_coarse_(
    model: PreTrainedModel,
    spec: ArchSpec,
    config: StructPruneConfig,
    batches: Sequence[Batch],
    mixture: Mixture,
    widths: Widths,
    report: Report,
) -> Plan:
    """Prune the spaces in `COARSE` to given widths.

    Args:
        model: The model that is changed, in eval mode.
        spec: Its description.
        config: How to prune.
        batches: Calibration text, one domain after the other.
        mixture: How the evidence of the domains is brought together.
        widths: Number of units to keep, by space; other spaces are left alone.
        report: Takes the time.
    """
    plan = Plan(spec.model_type, {})
    if LAYER in widths:
        with report.timed("layers"):
            depth = spec.of(LAYER)[0].width_in(widths)
            plan, spec = remove_layers_(model, config, batches, mixture, depth), describe(model, config.arch_file)
    if EXPERT in widths:
        with report.timed("experts"):
            sweep = Sweep(model, spec, config, mixture)
            new_config = shrunk_config(model.config, spec, {EXPERT: widths[EXPERT]})
            smaller = skeleton(model, new_config)
            sweep.remove_experts_(passes_over(model, spec, batches), {EXPERT: widths[EXPERT]}, smaller)
            adopt_config_(model, new_config, smaller)
            plan, spec = plan.then(sweep.plan), describe(model, config.arch_file)
    if HIDDEN in widths:
        with report.timed("channels"):
            width = spec.of(HIDDEN)[0].width_in(widths)
            plan = plan.then(remove_channels_(model, spec, config, batches, mixture, width))
    return plan
