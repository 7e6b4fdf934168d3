"""Prune layer by layer: calibrate, score, choose, refit and shrink.

`prune_layers_` takes these steps for each layer in turn:

- `source.advance_original` runs the original residual stream through the layer (layers.py), for error feedback.
- For each space of the layer that becomes smaller, in the order of the description:
    - calibrate: `source.moments` runs the layer on every batch, and `mixed` combines the moments of the domains
      (calibrate.py).
    - score: the criterion scores the units by the weights that read them and by the moments (`Criterion`).
    - choose: the units with the highest scores are kept.
    - refit: new values of the kept columns compensate for the removed columns and for the error of the earlier layers
      (refit.py). The removed columns are masked: they become zero.
- `shrink_layer_` replaces the layer by a smaller one (shrink.py), and `source.same_outputs` compares their outputs. In
  a round before the last and in a trial, the layer is only masked.
- `source.advance` runs the hidden states of the samples through the layer, to the next one.
- `on_layer` is called. Progress and checkpoints are attached there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import update_wrapper
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..arch.spec import Axis, Space, Widths
from ..system.errors import StructPruneError
from .calibrate import Moments, mixed
from .layers import Source
from .refit import ridge_strength
from .shrink import Masks, Values, read_consumer, shrink_layer_, units_to_columns


@dataclass(frozen=True)
class Method:
    """The criterion and the refit, with all their inputs except the moments.

    Args:
        criterion: The criterion.
        parameters: A function from the index of a layer to the criterion's keyword arguments there.
        refit: A function such as `refit.least_squares`.
        shares: The weights of the domains, which sum to 1.
        damping: The ridge of the refit; see `refit.ridge_strength`.
        gram: Whether Gram matrices are collected.
        statistics: The result of the criterion's passes through the whole model, by module, shape `(n,)` each.
    """

    criterion: Criterion
    parameters: Callable[[int], Mapping[str, Any]]
    refit: Callable[..., Values]
    shares: tuple[float, ...]
    damping: float
    gram: bool
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
    """Prune the layers of a model to their widths.

    Each layer is fitted to the outputs of the pruned layers before it.

    Args:
        masks: The masks of the model. The kept units are added to them.
        source: The source of activations.
        method: The criterion and the refit.
        widths: The widths after pruning.
        smaller: The model with these widths and without weights. Its layers replace the original layers. Without it,
            the removed units are only masked.
        layers: The indices of the layers to prune. The default is all layers.
        on_layer: A function that is called with the index of each finished layer.
    """
    arch = masks.arch
    if layers is None:
        layers = range(arch.num_layers)

    for layer in layers:
        with source.at(layer, changes=True):
            consumers: list[Axis] = []
            for space in arch.at(layer):
                consumers += space.consumers
            with masks.lifted(consumers):
                source.advance_original(layer, widths.keys())

            for space in arch.at(layer):
                width = space.width_in(widths) * space.scale
                if width < space.size:
                    prune_space_(masks, source, method, space, width)

            if smaller is not None:
                masks.irreversible = True
                with source.same_outputs(layer):
                    shrink_layer_(masks.model, arch, layer, masks.keep, smaller)

            source.advance(layer)
            on_layer(layer)


def prune_space_(masks: Masks, source: Source, method: Method, space: Space, width: int) -> None:
    """Choose the units of one space to keep, refit the columns that read them, and mask the other columns.

    Every refit starts from the original weights, so that the error of an earlier round is not fitted again. Scores are
    computed from the current weights, which already compensate for the units that an earlier round masked.
    """
    original, moments = calibrate(masks, source, method, space)

    units: Sequence[int] = range(space.size)
    weights = [weight for weight, _ in original]
    unit_moments = moments
    if space.key in masks.keep:
        units = masks.keep[space.key]
        weights, unit_moments = _current_values(masks, space, moments)

    scores = torch.stack(consumer_scores(method, space, weights, unit_moments)).sum(0)
    keep = tuple(units[index] for index in best_units(scores, width))

    refitted = refit_consumers(method, space, keep, original, moments)
    for axis, (columns, weight, bias) in zip(space.consumers, refitted, strict=True):
        masks.write_(axis, columns, weight, bias)
    masks.keep[space.key] = keep


def _current_values(masks: Masks, space: Space, moments: Sequence[Moments]) -> tuple[list[Tensor], list[Moments]]:
    """Return the current weights of the consumers of a space, and their moments, without the masked columns."""
    weights = []
    selected = []
    for axis, own_moments in zip(space.consumers, moments, strict=True):
        weight, _ = read_consumer(masks.model, axis)
        columns = units_to_columns(masks.keep[space.key], axis, weight.device)
        weights.append(weight[:, columns])
        selected.append(own_moments.select(columns))
    return weights, selected


def calibrate(masks: Masks, source: Source, method: Method, space: Space) -> tuple[list[Values], list[Moments]]:
    """Return the original values of the consumers of a space, and the moments of their inputs over all domains."""
    original = [masks.original(axis) for axis in space.consumers]
    weights = [weight for weight, _ in original]
    criterion = method.criterion

    # A refit starts from the original weights, so error feedback must measure their error.
    prior = None
    with masks.lifted(space.consumers):
        by_domain = source.moments(space.layer, space, method.gram)
        moments = mixed(by_domain, method.shares, weights)
        if criterion.prior is not None:
            prior = criterion.prior(masks.model, masks.arch, space)

    for axis, own_moments in zip(space.consumers, moments, strict=True):
        own_moments.prior = method.statistics.get(axis.module, prior)
    return original, moments


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
    method: Method, space: Space, keep: Sequence[int], original: Sequence[Values], moments: Sequence[Moments]
) -> list[tuple[Tensor, Tensor, Tensor | None]]:
    """Return the kept columns, the refitted weight, shape `(out, columns)`, and the bias of each consumer."""
    refitted = []
    for axis, (weight, bias), own_moments in zip(space.consumers, original, moments, strict=True):
        columns = units_to_columns(keep, axis, weight.device)
        ridge = ridge_strength(method.damping, len(columns), own_moments.count)
        new_weight, new_bias = method.refit(weight, bias, own_moments, columns, ridge)
        refitted.append((columns, new_weight, new_bias))
    return refitted


@dataclass(eq=False)
class Criterion:
    """A score function and its requirements. `criteria.register_criterion` creates it from a function.

    Args:
        name: The value of `StructPruneConfig.criterion` that selects it.
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
    """Return the units with the highest scores, ascending. `scores` has the shape `(units,)`."""
    return tuple(scores.topk(width).indices.sort().values.tolist())


def check_scores(scores: object, count: int, name: str, where: str) -> None:
    """Raise `StructPruneError` if scores are not one finite number for each unit."""
    if isinstance(scores, Tensor) and scores.shape == (count,) and bool(torch.isfinite(scores).all()):
        return

    result = f"{scores!r:.60}"
    if isinstance(scores, Tensor):
        result += f" of shape {tuple(scores.shape)}"
    raise StructPruneError(
        f"The criterion {name!r} must return {count} finite scores, one per unit, at {where}, as a tensor without "
        f"NaN. It returned {result}."
    )
