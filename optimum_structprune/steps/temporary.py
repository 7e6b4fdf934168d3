"""Prune the layers of a model for a measurement, and restore them afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from transformers import PreTrainedModel

from ..arch.spec import ArchSpec, Widths
from ..method.loop import prune_layers_
from ..method.shrink import Masks
from ..system.stages import progress
from .data import CalibrationData, source_of


# The approximate number of calibration tokens of a trial that divides a budget between tokens and layers.
DIVISION_TOKENS = 8192


@contextmanager
def temporarily_pruned(
    model: PreTrainedModel, arch: ArchSpec, data: CalibrationData, widths: Widths, tokens: int
) -> Iterator[None]:
    """Prune the layers of a model inside `with`. The removed units are masked, and restored at the end.

    Args:
        model: The original model.
        arch: The description of the model.
        data: The calibration text.
        widths: The widths of the spaces inside the layers.
        tokens: The approximate number of calibration tokens to use.
    """
    portion = data.portion(tokens)
    masks = Masks(model, arch)
    source = source_of(model, arch, portion.own_batches, portion.config.feedback_share)
    layers = progress(range(arch.num_layers), desc="Pruning on trial", unit="layer")
    try:
        prune_layers_(masks, source, portion.method(model, arch), widths, layers=layers)
        yield
    finally:
        masks.undo_(partial(source.at, changes=True))
