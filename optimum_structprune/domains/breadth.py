"""Text of every kind beside the domains of a user, which the model writes where it can."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from ..arch.plain import is_quantized
from ..config.domains import ANY, SELF, SelfTextConfig
from ..config.pruning import StructPruneConfig
from ..errors import StructPruneError
from ..system.offloading import is_offloaded
from .generated import self_documents


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


def with_written_text(
    config: StructPruneConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None
) -> StructPruneConfig:
    """A config whose text of every kind is what the model writes, where it can and nothing else is said.

    Args:
        config: What was asked for.
        model: The dense model.
        tokenizer: Its tokenizer, or None.
    """
    written = config.with_broad_text(SELF + ANY)
    if written is config or not writes_any(model, tokenizer, config.self_text, config.seed):
        return config
    return written


def writes_any(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, settings: SelfTextConfig, seed: int
) -> bool:
    """Whether a model writes text of every kind.

    It can write, its weights are where they can be used for each token anew, and what it writes is of use: the first
    documents are written here, and kept on the disk.

    Args:
        model: Any model.
        tokenizer: Its tokenizer, or None.
        settings: How it writes.
        seed: The seed of the text.
    """
    in_memory = not is_offloaded(model) and not is_quantized(model)
    if tokenizer is None or not in_memory or not model.can_generate() or model.config.is_encoder_decoder:
        return False
    try:
        next(self_documents(model, tokenizer, settings, ANY, seed))
    except StructPruneError as error:
        logger.warning("No text of every kind is written: %s", error)
        return False
    return True
