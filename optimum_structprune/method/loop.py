"""The method: calibrate, score, choose, refit and shrink, one layer after the other.

Lifecycle of `prune_layers_`, for each layer in turn:

- `source.advance_dense` takes the dense residual stream through the layer (layers.py), for error feedback.
- For each space of the layer that gets smaller, in the order of the description:
    - calibrate: `source.moments` runs the layer on every batch; `mixed` makes one set of moments of the domains
      (calibrate.py).
    - score: the criterion scores the units by the weights that read them and by the moments (`Criterion`).
    - choose: the units with the highest scores stay.
    - refit: the columns of the kept units make up for the removed ones and for the error of the layers in front
      (refit.py); the columns of the others are masked, which means that they become zero.
- Where the layer is cut, `shrink_layer_` replaces it by a smaller one (shrink.py), and `source.same_outputs` compares
  the two. A round before the last, and a pruning on trial, leave it masked.
- `source.advance` takes the hidden states of the samples through it, to the next layer.
- `on_layer` is told; that is where progress, records and checkpoints hang.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import update_wrapper
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..arch.spec import Space, Widths
from ..errors import StructPruneError
from .calibrate import Moments, mixed
from .layers import Source
from .refit import ridge_strength
from .shrink import Masks, Values, read_consumer, shrink_layer_, units_to_columns


@dataclass(frozen=True)
class Method:
    """The criterion and the refit, with all that they read beside the moments."""

    criterion: Criterion
    parameters: Callable[[int], Mapping[str, Any]]  # the criterion's keyword arguments in a layer, by its index
    refit: Callable[..., Values]  # a function such as `refit.least_squares`
    shares: tuple[float, ...]  # the weights of the domains, which sum to 1
    damping: float  # the ridge of the refit; see `refit.ridge_strength`
    gram: bool  # whether Gram matrices are gathered
    # What the criterion made of passes through the whole model, by module, shape `(n,)`.
    statistics: Mapping[str, Tensor] = field(default_factory=dict)


def prune_layers_(
    masks: Masks,
    source: Source,
    method: Method,
    widths: Widths,
    smaller: PreTrainedModel | None = None,
    layers: Iterable[int] | None = None,
    on_layer: Callable[[int], None] = lambda layer: None,
) -> None:
    """Bring every layer of a model, or some `layers`, to their widths.

    Each is fitted to its inputs behind the pruned layers before it. `masks` hold the model, and get the units that are
    kept. Without a `smaller` model all others are only masked. With one, which has no weights, its layers take the
    places of those of the model. `on_layer` is called with the index of each layer that is finished.
    """
    model, arch = masks.model, masks.arch
    for layer in range(arch.num_layers) if layers is None else layers:
        with source.at(layer, changes=True):
            with masks.lifted([axis for space in arch.at(layer) for axis in space.consumers]):
                source.advance_dense(layer, widths.keys())
            for space in arch.at(layer):
                if (width := space.width_in(widths) * space.scale) < space.size:
                    prune_space_(masks, source, method, space, width)
            if smaller is not None:
                masks.lost = True
                with source.same_outputs(layer):
                    shrink_layer_(model, arch, layer, masks.keep, smaller)
            source.advance(layer)
            on_layer(layer)


def prune_space_(masks: Masks, source: Source, method: Method, space: Space, width: int) -> None:
    """Choose units of one space to keep, refit the columns that read them, and mask all others.

    Every refit starts from the dense weights, so no error of an earlier round is fitted again. Scores are those of the
    present weights, in which a kept unit already makes up for units that an earlier round has masked.
    """
    dense, moments = calibrate(masks, source, method, space)
    weights, left, present = [weight for weight, _ in dense], moments, masks.keep.get(space.key, range(space.size))
    if space.key in masks.keep:
        weights = [read_consumer(masks.model, axis)[0] for axis in space.consumers]
        pairs = zip(space.consumers, weights, strict=True)
        columns = [units_to_columns(present, axis, weight.device) for axis, weight in pairs]
        weights = [weight[:, kept] for weight, kept in zip(weights, columns, strict=True)]
        left = [own_moments.select(kept) for own_moments, kept in zip(moments, columns, strict=True)]
    scores = torch.stack(consumer_scores(method, space, weights, left)).sum(0)
    keep = tuple(present[unit] for unit in best_units(scores, width))
    for axis, refitted in zip(space.consumers, refit_consumers(method, space, keep, dense, moments), strict=True):
        masks.write_(axis, *refitted)
    masks.keep[space.key] = keep


def calibrate(masks: Masks, source: Source, method: Method, space: Space) -> tuple[list[Values], list[Moments]]:
    """The dense values of the consumers of a space, and the moments of what they read, in the domain mixture."""
    model, arch, criterion, statistics = masks.model, masks.arch, method.criterion, method.statistics
    dense = [masks.dense(axis) for axis in space.consumers]
    # A refit starts from the dense weights, so error feedback has to see the error that these leave.
    with masks.lifted(space.consumers):
        by_domain = source.moments(space.layer, space, method.gram)
        moments = mixed(by_domain, method.shares, [weight for weight, _ in dense])
        prior = None if criterion.prior is None else criterion.prior(model, arch, space)
    for axis, own_moments in zip(space.consumers, moments, strict=True):
        own_moments.prior = statistics.get(axis.module, prior)
    return dense, moments


def consumer_scores(method: Method, space: Space, weights: list[Tensor], moments: list[Moments]) -> list[Tensor]:
    """Return the scores of the units of a space by each of its consumers, shape `(units,)`."""
    parameters = method.parameters(space.layer)
    scores = []
    for axis, weight, own_moments in zip(space.consumers, weights, moments, strict=True):
        own_scores = method.criterion.score(weight, own_moments, axis.per_unit, **parameters)
        check_scores(own_scores, weight.shape[1] // axis.per_unit, method.criterion.name, axis.module)
        scores.append(own_scores)
    return scores


def refit_consumers(
    method: Method, space: Space, keep: Sequence[int], dense: Sequence[Values], moments: Sequence[Moments]
) -> list[tuple[Tensor, Tensor, Tensor | None]]:
    """The kept columns of each consumer of a space, their refitted weight, shape `(out, columns)`, and the bias."""
    refitted = []
    for axis, (weight, bias), own_moments in zip(space.consumers, dense, moments, strict=True):
        columns = units_to_columns(keep, axis, weight.device)
        ridge = ridge_strength(method.damping, len(columns), own_moments.count)
        refitted.append((columns, *method.refit(weight, bias, own_moments, columns, ridge)))
    return refitted


@dataclass(eq=False)
class Criterion:
    """A score function and its needs; `criteria.register_criterion` makes one of a function.

    Args:
        name: What `StructPruneConfig.criterion` calls it.
        score: For units inside the layers, a function `(weight, moments, columns_per_unit, **parameters)`. Its
            arguments are the weight of a consumer, shape `(out, units * columns_per_unit)`, fp32; the moments of its
            input, with as many components as the weight has columns; the number of columns of a unit; and the
            declared `parameters`. It returns one score per unit, shape `(units,)`.
            For whole layers, a function `(model, arch, batches)`. Its arguments are the model in eval mode, its
            description, and text of one domain. It returns one positive score per layer, shape `(layers,)`, fp64. If
            several processes share the samples, each has its own batches, and a mean over all text needs
            `system.processes.all_reduce_`.
            For whole experts, a function `(norms, gates)`. Its arguments are the norms of an expert's outputs for the
            tokens that chose it and its gates for these tokens, shape `(tokens,)` each. It returns one number per
            token, and the score is their mean.
        judges: The scored part: "unit" (inside the layers), "layer" or "expert" (both whole).
        paper: The publication.
        parameters: Names of fields of `StructPruneConfig`, or "damping", that a `score` of units gets as keyword
            arguments. The seed differs in each layer.
        needs_gram: Whether `score` reads `moments.gram`. Otherwise only mean and second moment are collected.
        summed: Whether the score of an expert is the sum over its tokens instead of the mean.
        prior: A function `(model, arch, space)` that returns one value for each component of the consumers' inputs
            from the weights alone, shape `(n,)`, or None. The result becomes `moments.prior`.
        whole_model_statistics: A function `(model, arch, data)` that runs the whole model before each round and
            returns one tensor per consumer, by module, shape `(domains, n)`, fp64. The mean by the weights of the
            domains becomes `moments.prior`.
        check: A function `(config, arch, use)` that raises a StructPruneError before any text is read if the
            criterion cannot score this model. `use` is "prune", "dry run" or "trainer".
    """

    name: str
    score: Callable[..., Tensor]
    judges: str = "unit"
    paper: str = ""
    parameters: tuple[str, ...] = ()
    needs_gram: bool = False
    summed: bool = False
    prior: Callable[..., Tensor | None] | None = None
    whole_model_statistics: Callable[..., dict[str, Tensor]] | None = None
    check: Callable[..., None] | None = None

    def __post_init__(self) -> None:
        update_wrapper(self, self.score)

    def __call__(self, *arguments: Any, **parameters: Any) -> Tensor:
        """Return the scores of the decorated function."""
        return self.score(*arguments, **parameters)


def best_units(scores: Tensor, width: int) -> tuple[int, ...]:
    """The units with the highest scores, ascending. `scores` has the shape `(units,)`."""
    return tuple(scores.topk(width).indices.sort().values.tolist())


def check_scores(scores: object, count: int, name: str, where: str) -> None:
    """Refuse what a criterion gave, unless it is one finite number for each unit."""
    if isinstance(scores, Tensor) and scores.shape == (count,) and bool(torch.isfinite(scores).all()):
        return
    shape = f", of the shape {tuple(scores.shape)}" if isinstance(scores, Tensor) else ""
    raise StructPruneError(
        f"The criterion {name!r} has to give {count} finite scores, one per unit, at {where}, as a tensor without "
        f"NaN; it gives {scores!r:.60}{shape}."
    )
