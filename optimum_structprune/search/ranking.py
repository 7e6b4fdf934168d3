"""One ranking of all units of a dense model, from one pass over it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..arch.spec import ArchSpec
from ..config.pruning import ALLOCATIONS
from ..method.loop import calibrate, consumer_scores
from ..method.shrink import Masks
from ..sources.data import CalibrationData
from ..system.stages import progress


Scores = dict[tuple[int, str], Tensor]


@ALLOCATIONS.register("global")
def dense_scores(model: PreTrainedModel, arch: ArchSpec, data: CalibrationData, names: Collection[str]) -> Scores:
    """Scores of all units that compare over layers and spaces, from one pass over the dense model.

    Args:
        model: The dense model, in eval mode, which stays as it is.
        arch: The description of the model.
        data: The samples of the run and its config.
        names: The kinds of space that shrink.

    Returns:
        By layer and name of the space, shape `(units,)`; the units with the lowest scores go first.
    """
    method, source, scores = data.method(model, arch), data.source(model, arch, fixed=True), Scores()
    method = replace(method, gram=method.criterion.needs_gram)  # no refit reads it
    masks = Masks(model, arch)
    for layer in progress(range(arch.num_layers), desc="ranking", unit="layer"):
        with source.at(layer):
            for space in arch.at(layer):
                if space.kind in names:
                    dense, moments = calibrate(masks, source, method, space)
                    weights = [weight for weight, _ in dense]
                    by_consumer = consumer_scores(method, space, weights, moments, by_column=True)
                    pairs = zip(by_consumer, space.consumers, strict=True)
                    comparable = [standardised(columns, axis.per_unit).cpu() for columns, axis in pairs]
                    scores[space.key] = torch.stack(comparable).mean(0)
            source.advance(layer)
    return scores


def standardised(columns: Tensor, columns_per_unit: int) -> Tensor:
    """Scores that can be compared over layers and spaces, shape `(units,)`: the mean z-score of a unit's columns.

    As in FLAP (An et al. 2023, section 3.3), the score of every column, shape `(units * columns_per_unit,)`, is
    standardised over the columns of its layer. It is a mean and not a sum, so that it is a score per column, and
    thereby per parameter.
    """
    spread = columns.std(correction=0).clamp(min=torch.finfo(columns.dtype).tiny)
    return ((columns - columns.mean()) / spread).reshape(-1, columns_per_unit).mean(1)
