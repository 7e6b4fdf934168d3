"""A handful of inputs, and the proof that a cut model computes for them what the masked one did."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..method.layers import run_model
from ..method.shrink import check_same
from .generation import positions_of, reads_images
from .metrics import evaluating, outputs_of


def few_inputs(model: PreTrainedModel) -> Tensor:
    """Random tokens, shape `(1, 16)` or as many as the model reads, or a random image."""
    generator = torch.Generator().manual_seed(0)
    config = model.config
    if reads_images(model) and hasattr(config, "image_size"):
        size = config.image_size if isinstance(config.image_size, int) else config.image_size[0]
        return torch.randn(1, config.num_channels, size, size, generator=generator).to(model.dtype)
    length = int(min(16, positions_of(model)))
    return torch.randint(config.get_text_config().vocab_size, (1, length), generator=generator)


@torch.no_grad()
def outputs_for(model: PreTrainedModel, inputs: Tensor | None = None) -> Tensor:
    """What a model gives for inputs, or for a few, shape `(1, tokens, vocab)` or `(1, tokens, channels)`."""
    with evaluating(model):
        return outputs_of(run_model(model, few_inputs(model) if inputs is None else inputs))


@contextmanager
def same_outputs(what: str, model: PreTrainedModel) -> Iterator[None]:
    """Refuse what changes the outputs of a model inside `with`; see `check_same`."""
    before = outputs_for(model)
    yield
    check_same(what, before, outputs_for(model))
