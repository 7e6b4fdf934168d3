"""Training the weights of a model themselves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from .adapter import seeded, set_trainable_, trainable_of


@contextmanager
def every_weight(model: PreTrainedModel, seed: int) -> Iterator[PreTrainedModel]:
    """The model with all of its weights trainable, which a failure inside `with` gives their old values.

    Random numbers follow the seed inside `with`, and go on afterwards as they were. A copy of all weights lies in the
    memory of the CPU meanwhile.
    """
    training, trainable = model.training, trainable_of(model)
    before = {name: parameter.detach().to("cpu", copy=True) for name, parameter in model.named_parameters()}
    try:
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        with seeded(seed):
            yield model
    except BaseException:  # Ctrl-C too
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(before[name])
        raise
    finally:
        for parameter in model.parameters():
            parameter.grad = None
        set_trainable_(model, trainable)
        model.train(training)
