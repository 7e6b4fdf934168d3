"""Text of every kind beside the domains of a user, which the model writes where it can."""

from __future__ import annotations

import logging

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..arch.plain import is_quantized
from ..config.domains import ANY, SELF
from ..config.pruning import StructPruneConfig
from ..errors import StructPruneError
from ..system.offloading import is_offloaded
from .load import Domain, load_domains


logger = logging.getLogger(__name__)


def with_written_text(
    config: StructPruneConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None
) -> StructPruneConfig:
    """A config whose text of every kind is what the model writes, where it generates and nothing else is said."""
    return config if tokenizer is None or not _can_write(model) else config.with_broad_text(SELF + ANY)


def calibration_domains(
    config: StructPruneConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[StructPruneConfig, list[Domain]]:
    """The domains of a config, with text of every kind beside them that the model writes, where it can.

    Returns:
        The config that says which text has been read, and the domains.
    """
    written, vocab_size = with_written_text(config, model, tokenizer), model.config.get_text_config().vocab_size
    try:
        return written, load_domains(written, tokenizer, vocab_size, model=model)
    except StructPruneError as error:
        if written is config:
            raise
        reason = error
    # Some models write nothing that is of use. A mistake in the domains themselves is found again.
    domains = load_domains(config, tokenizer, vocab_size, model=model)
    logger.warning("No text of every kind is written: %s", reason)
    return config, domains


def _can_write(model: PreTrainedModel) -> bool:
    """Whether a model generates, and its weights are where they can be used for each token anew."""
    in_memory = not is_offloaded(model) and not is_quantized(model)
    return in_memory and model.can_generate() and not model.config.is_encoder_decoder
