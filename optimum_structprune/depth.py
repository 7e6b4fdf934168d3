"""The space `layer`: whole blocks go."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

import torch

from .arch.load import block_list, describe, put_blocks_
from .arch.shrink import shrunk_config
from .arch.spec import LAYER, MODEL, ArchSpec
from .calibration.evidence import Mixture
from .config import StructPruneConfig
from .criteria.layers import BLOCK_INFLUENCE, LAYER_CRITERIA
from .plan import Plan
from .schedule import round_widths
from .surgery import adopt_config_, replace_, skeleton


if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .calibration.taps import Batch


def remove_layers_(
    model: PreTrainedModel, config: StructPruneConfig, batches: Sequence[Batch], mixture: Mixture, width: int
) -> Plan:
    """Take out the blocks that matter least, in `config.rounds` steps, each judged on what the last one left.

    Args:
        model: The model that is changed, in eval mode.
        config: How to prune; its criterion counts where it judges blocks, otherwise it is block influence.
        batches: Calibration text, one domain after the other.
        mixture: How the evidence of the domains is brought together.
        width: Number of blocks to keep.
    """
    criterion = LAYER_CRITERIA.get(
        config.scored_by if config.scored_by in LAYER_CRITERIA.names() else BLOCK_INFLUENCE
    )()
    spec = describe(model, config.arch_file)
    plan = Plan(spec.model_type, {})
    for step in round_widths(config, spec, {LAYER: width}):
        spec = describe(model, config.arch_file)
        left = spec.of(LAYER)[0].width_in(step)
        parts = [criterion.score(model, spec, list(own)) for _, own in groupby(batches, lambda batch: batch.domain)]
        scores = mixture.judge_experts(torch.stack(parts))
        keep = tuple(sorted(scores.topk(left).indices.tolist()))
        drop_blocks_(model, spec, keep)
        plan = plan.then(Plan(spec.model_type, {(MODEL, LAYER): keep}))
    return plan


@torch.no_grad()
def drop_blocks_(model: PreTrainedModel, spec: ArchSpec, keep: Sequence[int]) -> None:
    """Take whole blocks out, and build those that stay anew, with the numbers that the shorter config gives them.

    Args:
        model: The model that is changed.
        spec: Its description.
        keep: Blocks that stay, ascending.

    Raises:
        StructPruneError: If the config class refuses the depth, or makes other blocks of it than those that stay.
    """
    config = shrunk_config(model.config, spec, {LAYER: len(keep)}, blocks=keep)
    shorter = skeleton(model, config)
    old, new = block_list(model, spec), block_list(shorter, spec)
    for index, block in zip(keep, new, strict=True):
        replace_(old[index], block, old[index].state_dict(), spec)
    put_blocks_(model, spec, new)
    adopt_config_(model, config, shorter)
