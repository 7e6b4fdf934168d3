"""The method: calibrate, score, choose, refit and shrink, one layer after the other.

Lifecycle of `prune_layers_`, for each layer in turn:

- `source.advance_dense` takes the dense residual stream through the layer (layers.py), for error feedback.
- For each space of the layer that gets smaller, in the order of the description:
    - calibrate: `source.moments` runs the layer on every batch; `mixed` makes one set of moments of the domains
      (calibrate.py).
    - score: the criterion scores the units by the weights that read them and by the moments (score.py).
    - choose: the units with the highest scores stay.
    - refit: the columns of the kept units make up for the removed ones and for the error of the layers in front
      (refit.py, linalg.py); the columns of the others become zero.
- `shrink_layer_` replaces the layer by a smaller one (shrink.py), and `source.same_outputs` compares the two.
- `source.advance` takes the hidden states of the samples through it, to the next layer.
- `on_layer` is told; that is where progress, records and checkpoints hang.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..arch.spec import ArchSpec, Axis, Space, Widths
from .calibrate import Moments, mixed
from .linalg import ridge_strength
from .score import best_units, check_scores
from .shrink import Values, read_consumer, shrink_layer_, units_to_columns, write_consumer_


@dataclass(frozen=True)
class Method:
    """How units are scored, and what makes up for those that are removed."""

    criterion: Callable[[int], Any]  # gives the `Criterion` of a layer, by its index
    refit: Callable[..., Values]  # a function such as `refit.least_squares`
    shares: tuple[float, ...]  # the weights of the domains, which sum to 1
    damping: float  # the ridge of the refit; see `linalg.ridge_strength`
    gram: bool  # whether Gram matrices are gathered
    unfitted: bool = False  # whether the kept columns stay as the criterion's `unfitted_weight` has them
    name: str = ""  # the name of the criterion, for messages
    # What the criterion made of passes through the whole model, by module, shape `(n,)`.
    statistics: Mapping[str, Tensor] = field(default_factory=dict)

    def prior(self, criterion: Any, model: PreTrainedModel, arch: ArchSpec, space: Space, axis: Axis) -> Tensor | None:
        """What the criterion knows of each component that a consumer reads, beside its moments, shape `(n,)`."""
        return self.statistics.get(axis.module, criterion.prior(model, arch, space))


def prune_layers_(
    model: PreTrainedModel,
    arch: ArchSpec,
    source: Any,
    method: Method,
    widths: Widths,
    smaller: PreTrainedModel,
    keep: dict[tuple[int, str], tuple[int, ...]],
    layers: Sequence[int] | None = None,
    on_layer: Callable[[int], None] = lambda layer: None,
) -> None:
    """Bring every layer of a model, or some `layers`, to their widths; each is fitted to what it reads behind the
    smaller layers before it.

    `source` is `layers.InMemory`, or what has its methods. Layers of the `smaller` model, which has no weights, take
    the places of those of the model, and the units that they keep are added to `keep`. `on_layer` is called with the
    index of each layer that is finished.
    """
    for layer in range(arch.num_layers) if layers is None else layers:
        with source.at(layer, changes=True):
            source.advance_dense(layer, widths.keys())
            for space in arch.at(layer):
                if (width := space.width_in(widths) * space.scale) < space.size:
                    prune_space_(model, arch, source, method, space, width, keep)
            with source.same_outputs(layer):
                shrink_layer_(model, arch, layer, keep, smaller)
            source.advance(layer)
            on_layer(layer)


def prune_space_(
    model: PreTrainedModel,
    arch: ArchSpec,
    source: Any,
    method: Method,
    space: Space,
    width: int,
    keep: dict[tuple[int, str], tuple[int, ...]],
) -> None:
    """Choose the units of one space that stay, refit the columns that read them, and make all others zero."""
    criterion, values = method.criterion(space.layer), [read_consumer(model, axis) for axis in space.consumers]
    by_domain = source.moments(space.layer, space, method.gram)
    moments = mixed(by_domain, method.shares, [weight for weight, _ in values])
    for axis, of_consumer in zip(space.consumers, moments, strict=True):
        of_consumer.prior = method.prior(criterion, model, arch, space, axis)
    scores = score_units(criterion, space, [weight for weight, _ in values], moments, method.name)
    keep[space.key] = choose_units(criterion, space, scores, width, range(space.size), values, moments)
    refitted = refit_consumers(criterion, space, keep[space.key], values, moments, method)
    for axis, columns in zip(space.consumers, refitted, strict=True):
        write_consumer_(model, axis, *columns)


def score_units(
    criterion: Any, space: Space, weights: Sequence[Tensor], moments: Sequence[Moments], name: str
) -> Tensor:
    """The scores of the units of a space, summed over its consumers, shape `(units,)`."""
    scores = []
    for axis, weight, of_consumer in zip(space.consumers, weights, moments, strict=True):
        scores.append(criterion.score(weight, of_consumer, axis.per_unit))
        check_scores(scores[-1], weight.shape[1] // axis.per_unit, name, axis.module)
    return torch.stack(scores).sum(0)


def choose_units(
    criterion: Any,
    space: Space,
    scores: Tensor,
    width: int,
    present: Sequence[int],
    values: Sequence[Values],
    moments: Sequence[Moments],
) -> tuple[int, ...]:
    """The units with the highest scores of those that are `present`, or those that the criterion takes in their place.
    `values` and `moments` are those of the dense consumers.
    """
    keep = tuple(present[unit] for unit in best_units(scores, width))
    if len(space.consumers) > 1:  # what a set of units is worth is known of one consumer, not of several
        return keep
    removed = sorted({*present} - {*keep})
    return criterion.refine_selection(keep, removed, values[0][0], moments[0], space.consumers[0].per_unit)


def refit_consumers(
    criterion: Any,
    space: Space,
    keep: Sequence[int],
    values: Sequence[Values],
    moments: Sequence[Moments],
    method: Method,
) -> list[tuple[Tensor, Tensor, Tensor | None]]:
    """The kept columns of each consumer of a space, their refitted weight, shape `(out, columns)`, and the bias."""
    refitted = []
    for axis, (weight, bias), of_consumer in zip(space.consumers, values, moments, strict=True):
        columns = units_to_columns(keep, axis, weight.device)
        start = criterion.unfitted_weight(weight, of_consumer) if method.unfitted else weight
        ridge = ridge_strength(method.damping, len(columns), of_consumer.count)
        refitted.append((columns, *method.refit(start, bias, of_consumer, columns, ridge)))
    return refitted
