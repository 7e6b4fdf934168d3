"""One ranking of all units of a dense model, from one pass over it."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..arch.spec import ArchSpec, Space
from ..config.pruning import ALLOCATIONS
from ..method.calibrate import mixed
from ..method.loop import Method
from ..method.score import check_scores
from ..method.shrink import read_consumer
from ..sources.data import CalibrationData, Source
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
    method, source, scores = data.method(model, arch), data.source(model, arch, fixed=True), {}
    for layer in progress(range(arch.num_layers), desc="ranking", unit="layer"):
        with source.at(layer):
            for space in arch.at(layer):
                if space.kind in names:
                    scores[space.key] = _comparable(model, arch, space, source, method)
            source.advance(layer)
    return scores


def _comparable(model: PreTrainedModel, arch: ArchSpec, space: Space, source: Source, method: Method) -> Tensor:
    """Scores of the units of a space that compare over layers, shape `(units,)`."""
    criterion, by_consumer = method.criterion(space.layer), []
    weights = [read_consumer(model, axis)[0] for axis in space.consumers]
    moments = mixed(source.moments(space.layer, space, criterion.needs_gram), method.shares, weights)
    for axis, weight, of_consumer in zip(space.consumers, weights, moments, strict=True):
        of_consumer.prior = method.prior(criterion, model, arch, space, axis)
        columns = criterion.score(weight, of_consumer, 1)
        check_scores(columns, weight.shape[1], method.name, axis.module)
        by_consumer.append(standardised(columns, axis.per_unit).cpu())
    return torch.stack(by_consumer).mean(0)


def standardised(columns: Tensor, columns_per_unit: int) -> Tensor:
    """Scores that can be compared over layers and spaces, shape `(units,)`: the mean z-score of a unit's columns.

    As in FLAP (An et al. 2023, section 3.3), the score of every column, shape `(units * columns_per_unit,)`, is
    standardised over the columns of its layer. It is a mean and not a sum, so that it is a score per column, and
    thereby per parameter.
    """
    spread = columns.std(correction=0).clamp(min=torch.finfo(columns.dtype).tiny)
    return ((columns - columns.mean()) / spread).reshape(-1, columns_per_unit).mean(1)
