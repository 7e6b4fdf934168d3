"""The proof that a cut model computes what the masked one did: outputs for a handful of inputs, before and after."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..arch.spec import ArchSpec
from ..errors import StructPruneError
from .generation import positions_of, reads_images
from .layers import Batch, LayerRunner, NotSequentialError
from .metrics import evaluating, outputs_of, run_model
from .placement import Placement


# How far the outputs for the median token may be apart, relative to their norm: by so much, ten steps of TF32, or by
# so many steps of the dtype. Tiny models of all families show 0 to 3 steps for one layer, and up to 4 for two layers
# whose weights are rounded anew for a narrower residual stream. Rounding may send single tokens to another expert.
TOLERANCE = 1e-2
STEPS = 16


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


def outputs_of_layers(model: PreTrainedModel, arch: ArchSpec) -> Callable[[Sequence[int]], Tensor]:
    """What some layers, one after the other, make of a few inputs; where they cannot run one by one, what the whole
    model makes of them.
    """
    try:
        runner, placement = LayerRunner(model, arch, [Batch(0, few_inputs(model))]), Placement(model, arch)
    except NotSequentialError:
        return lambda layers: outputs_for(model)

    def outputs(layers: Sequence[int]) -> Tensor:
        hidden = runner.hidden[0]
        for layer in layers:
            with placement.at(layer):
                hidden = runner.output(layer, 0, hidden)
        return hidden

    return outputs


@contextmanager
def same_outputs(what: str, outputs: Callable[[], Tensor]) -> Iterator[None]:
    """Refuse a change inside `with` that changes outputs; see `check_same`."""
    before = outputs()
    yield
    check_same(what, before, outputs())


def check_same(what: str, masked: Tensor, pruned: Tensor) -> None:
    """Refuse what gives other outputs, shape `(…, tokens, channels)`, than it gave while its units were masked."""
    eps = torch.finfo(pruned.dtype).eps
    masked, pruned = masked.float(), pruned.float()
    errors, limit = (pruned - masked).norm(dim=-1) / masked.norm(dim=-1), max(TOLERANCE, STEPS * eps)
    if masked.isfinite().all() and not (error := float(errors.median())) <= limit:
        raise StructPruneError(
            f"{what} gives other outputs than with the removed units masked: they differ by {error:.2g} of their "
            f"norm, and rounding explains {limit:.2g}. Either the description of the model type is wrong, or the "
            "model was changed in a way that its config does not tell."
        )
