"""The last hidden states of encoders and other models."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..arch.hooks import in_fast_dtype
from ..arch.modules import blocks
from ..method.layers import input_device, run_model


def last_states(model: Any, ids: Tensor) -> Tensor:
    """Return the last hidden states of a batch of token ids, shape `(batch, tokens, channels)`."""
    if not model.config.is_encoder_decoder:
        return run_model(model.base_model, ids)[0]

    # The classes of T5 have no base model inside, and return logits.
    ids = ids.to(input_device(model))
    encoder = model.get_encoder()
    decoder = model.get_decoder()
    with in_fast_dtype(blocks(model)):
        return decoder(input_ids=ids, encoder_hidden_states=encoder(ids)[0], use_cache=False)[0]
