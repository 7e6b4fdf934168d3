"""The space `layer`: whole layers go."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

import torch

from ..arch.load import describe
from ..arch.spec import LAYER, MODEL
from ..config.pruning import StructPruneConfig
from ..criteria.layers import BLOCK_INFLUENCE, LAYER_CRITERIA
from ..criteria.mixture import Mixture
from ..surgery.cut import drop_layers_
from ..surgery.plan import Plan
from ..widths.schedule import round_widths


if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..calibration.tally import Batch


def remove_layers_(
    model: PreTrainedModel, config: StructPruneConfig, batches: Sequence[Batch], mixture: Mixture, width: int
) -> Plan:
    """Take out the layers that matter least, in `config.rounds` steps, each judged on what the last one left.

    Args:
        model: The model that is changed, in eval mode.
        config: How to prune; its criterion counts where it judges layers, otherwise it is layer influence.
        batches: Calibration text, one domain after the other.
        mixture: How the evidence of the domains is brought together.
        width: Number of layers to keep.
    """
    criterion = LAYER_CRITERIA.get(
        config.scored_by if config.scored_by in LAYER_CRITERIA.names() else BLOCK_INFLUENCE
    )()
    arch = describe(model, config.arch_file)
    plan = Plan(arch.model_type, {})
    for step in round_widths(config, arch, {LAYER: width}):
        arch = describe(model, config.arch_file)
        left = arch.of(LAYER)[0].width_in(step)
        parts = [criterion.score(model, arch, list(own)) for _, own in groupby(batches, lambda batch: batch.domain)]
        scores = mixture.judge_experts(torch.stack(parts))
        keep = tuple(sorted(scores.topk(left).indices.tolist()))
        drop_layers_(model, arch, keep)
        plan = plan.then(Plan(arch.model_type, {(MODEL, LAYER): keep}))
    return plan
