"""Text of every kind beside the domains of a user, which the model writes where it can."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from ..arch.plain import is_quantized
from ..config.domains import ANY, SELF
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
    if written is config or tokenizer is None or not _can_write(model):
        return config
    try:
        # Some models write nothing that is of use. What is written here is kept on the disk.
        next(self_documents(model, tokenizer, config.self_text, ANY, config.seed))
    except StructPruneError as error:
        logger.warning("No text of every kind is written: %s", error)
        return config
    return written


def _can_write(model: PreTrainedModel) -> bool:
    """Whether a model generates, and its weights are where they can be used for each token anew."""
    in_memory = not is_offloaded(model) and not is_quantized(model)
    return in_memory and model.can_generate() and not model.config.is_encoder_decoder
