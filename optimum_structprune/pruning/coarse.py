"""What goes before the rounds, the coarsest first: whole layers, whole experts, channels of the residual stream."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..arch.load import describe
from ..arch.meta import skeleton
from ..arch.shrink import shrunk_config
from ..arch.spec import EXPERT, HIDDEN, LAYER, ArchSpec, Widths
from ..calibration.passes import passes_over
from ..config.pruning import StructPruneConfig
from ..criteria.mixture import Mixture
from ..saving.report import Report
from ..surgery.cut import adopt_config_
from ..surgery.plan import Plan
from .channels import remove_channels_
from .layers import remove_layers_
from .sweep import Sweep


if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..calibration.tally import Batch


def prune_coarse_(
    model: PreTrainedModel,
    arch: ArchSpec,
    config: StructPruneConfig,
    batches: Sequence[Batch],
    mixture: Mixture,
    widths: Widths,
    report: Report,
) -> Plan:
    """Prune the spaces in `COARSE` to given widths.

    Args:
        model: The model that is changed, in eval mode.
        arch: Its description.
        config: How to prune.
        batches: Calibration text, one domain after the other.
        mixture: How the evidence of the domains is brought together.
        widths: Number of units to keep, by space; other spaces are left alone.
        report: Takes the time.
    """
    plan = Plan(arch.model_type, {})
    if LAYER in widths:
        with report.timed("layers"):
            depth = arch.of(LAYER)[0].width_in(widths)
            plan, arch = remove_layers_(model, config, batches, mixture, depth), describe(model, config.arch_file)
    if EXPERT in widths:
        with report.timed("experts"):
            sweep = Sweep(model, arch, config, mixture)
            new_config = shrunk_config(model.config, arch, {EXPERT: widths[EXPERT]})
            smaller = skeleton(model, new_config)
            sweep.remove_experts_(passes_over(model, arch, batches), {EXPERT: widths[EXPERT]}, smaller)
            adopt_config_(model, new_config, smaller)
            plan, arch = plan.then(sweep.plan), describe(model, config.arch_file)
    if HIDDEN in widths:
        with report.timed("channels"):
            width = arch.of(HIDDEN)[0].width_in(widths)
            plan = plan.then(remove_channels_(model, arch, config, batches, mixture, width))
    return plan
