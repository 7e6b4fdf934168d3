"""Depth in a config: whatever it says of single blocks, cut down to those that stay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from transformers import PretrainedConfig

COUNTS = ("max_window_layers", "first_k_dense_replace")  # so many blocks from the first
INDICES = ("mlp_only_layers",)  # the numbers of some blocks
# Lists that are never one entry a block, even where they happen to be as long.
APART = ("architectures", "bad_words_ids", "eos_token_id", "pos_att_type", "suppress_tokens")


def cut_depth_(config: PretrainedConfig, keep: Sequence[int], size: int) -> None:
    """Cut every list with one entry a block, and renumber what names or counts blocks.

    A list with one entry a block is known by its length; transformers has no other mark for it.

    Args:
        config: Of the model that has the blocks; it is changed.
        keep: Blocks that stay, ascending.
        size: Number of blocks before.
    """
    for key, value in list(vars(config).items()):
        if key in COUNTS and value is not None:
            setattr(config, key, sum(block < value for block in keep))
        elif key in INDICES and value is not None:
            setattr(config, key, [place for place, block in enumerate(keep) if block in value])
        elif isinstance(value, (list, tuple)) and len(value) == size and key not in APART:
            setattr(config, key, type(value)(value[block] for block in keep))
