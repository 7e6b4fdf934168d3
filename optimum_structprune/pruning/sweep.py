"""The heart of a pruning: gather, score, choose, refit and shrink, one layer after the other."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils.logging import tqdm

from ..arch.spec import ArchSpec, Axis, Space, Widths
from ..calibration.linalg import ridge_strength
from ..calibration.mixture import Mixture, Pool, pooled
from ..calibration.moments import Moments
from ..calibration.passes import Passes
from ..config.pruning import StructPruneConfig
from ..criteria import CRITERIA, Criterion
from ..criteria.base import check_scores, standardised
from ..criteria.obs import producer_norms
from ..forward.placement import Placement
from ..forward.same import outputs_of_layers, same_outputs
from ..surgery.consumers import Consumers, Values, units_to_columns
from ..surgery.cut import fill_layer_, shrink_layer_
from ..surgery.plan import Plan, best_units
from ..surgery.refit import REFITS


Keep = Mapping[tuple[int, str], tuple[int, ...]]


@dataclass(frozen=True)
class Snapshot:
    """What a sweep has reached: the kept units, by layer and space, and the values of their consumers."""

    keep: Keep
    consumers: Mapping[Axis, Values]


class Sweep:
    """Prunes the units inside the layers of a model, in one pass over the layers or in several.

    Between passes, removed units are only masked. Every refit starts from the dense weights and aims at the dense
    layer's output on the present residual stream, so no error of an earlier pass is fitted again. Scores, in contrast,
    are those of the refitted weights, in which a kept unit already makes up for units removed before.

    `keep` holds the kept units so far, by layer and space; `shrunk` says whether a layer has lost its removed units
    for good.
    """

    def __init__(self, model: PreTrainedModel, arch: ArchSpec, config: StructPruneConfig, refit: str | None = None):
        self.model, self.arch, self.config = model, arch, config
        self.refit = refit or config.refit
        self.keep: dict[tuple[int, str], tuple[int, ...]] = {}
        self.placement = Placement(model, arch)
        self.consumers = Consumers(model, self.placement)
        self.shrunk = False

    @cached_property
    def outputs(self) -> Callable[[Sequence[int]], Tensor]:
        """What some of the layers make of a few inputs; see `outputs_of_layers`."""
        return outputs_of_layers(self.model, self.arch)

    @property
    def plan(self) -> Plan:
        """The kept units, as a value."""
        return Plan(self.arch.model_type, dict(self.keep))

    def run_(self, passes: Passes, mixture: Mixture, widths: Widths, skeleton: PreTrainedModel | None = None) -> None:
        """Bring all layers to their widths, one after the other; see `prune_layer_`."""
        for layer in tqdm(range(self.arch.num_layers), desc="trial", unit="layer"):
            with self.placement.at(layer, changes=True):
                self.prune_layer_(layer, passes, mixture, widths, skeleton)

    def prune_layer_(
        self, layer: int, passes: Passes, mixture: Mixture, widths: Widths, skeleton: PreTrainedModel | None
    ) -> None:
        """Bring one layer to its widths, and the samples behind it: by masks, or with the `skeleton` of the smaller
        model to the size that the layer has there.
        """
        axes = [axis for space in self.arch.at(layer) for axis in space.into]
        with self.consumers.as_dense(axes):
            passes.advance_dense(layer, widths.keys())
        for space in self.arch.at(layer):
            width = space.width_in(widths) * space.scale
            if width < space.size:
                gathered = self.gather(passes, space, mixture)
                scores = self.score(space, gathered)
                self.choose_(space, gathered, scores, width)
                self.refit_(space, gathered)
                del gathered  # before those of the next space: a Gram matrix takes gigabytes
        if skeleton is not None:
            self.shrunk = True
            with same_outputs(f"Layer {layer}", lambda: self.outputs([layer])):
                shrink_layer_(self.model, self.arch, layer, self.plan, skeleton)
            self.consumers.forget(axes)
        passes.advance(layer)

    def gather(self, passes: Passes, space: Space, mixture: Mixture) -> list[Moments]:
        """What the samples say of a space: the moments of the domain mixture, by consumer."""
        pools = [Pool(mixture, self.consumers.dense(axis)[0]) for axis in space.into]
        gram = CRITERIA.get(self.config.scored_by).needs_gram or self.config.refit_reads_gram
        # A refit starts from the dense weights, so error feedback has to see the error that these leave.
        with self.consumers.as_dense(space.into):
            return pooled(passes, space, gram, pools)

    def score(self, space: Space, gathered: Sequence[Moments]) -> Tensor:
        """The scores of the units that are left, by the present weights, summed over the consumers of the space, shape
        `(units,)`.
        """
        criterion, units, total = self._criterion(space.layer), len(self._before(space)), []
        for axis, of_consumer in zip(space.into, gathered, strict=True):
            weight, moments = self._present(criterion, space, axis, of_consumer)
            scores = criterion.score(weight, moments, axis.per_unit)
            check_scores(scores, units, self.config.scored_by, axis.module)
            total.append(scores)
        return torch.stack(total).sum(0)

    def choose_(self, space: Space, gathered: Sequence[Moments], scores: Tensor, width: int) -> None:
        """Keep the units with the highest scores, or those that the criterion takes in their place."""
        before = self._before(space)
        keep = tuple(before[unit] for unit in best_units(scores, width))
        if len(space.into) == 1:  # what a set of units is worth is known of one consumer, not of several
            (axis,), (moments,) = space.into, gathered
            others, dense = sorted({*before} - {*keep}), self.consumers.dense(axis)[0]
            criterion = self._criterion(space.layer)
            keep = criterion.exchanged(keep, others, dense, moments, axis.per_unit)
        self.keep[space.key] = keep

    def refit_(self, space: Space, gathered: Sequence[Moments]) -> None:
        """Give each consumer of a space its refitted columns and mask the others."""
        criterion, keep = self._criterion(space.layer), self.keep[space.key]
        for axis, moments in zip(space.into, gathered, strict=True):
            weight, bias = self.consumers.dense(axis)
            columns = units_to_columns(keep, axis, weight.device)
            start = criterion.unfitted(weight, moments) if self.refit == "none" else weight
            ridge = ridge_strength(self.config.damping, len(columns), moments.count)
            refitted = REFITS.get(self.refit)(start, bias, moments, columns, ridge)
            self.consumers.mask_(axis, columns, *refitted)

    def trial(self, space: Space, gathered: Sequence[Moments], scores: Tensor, width: int) -> dict[Axis, Values]:
        """The values of the consumers of one space if it kept `width` units; the model is left as it is."""
        keep = dict(self.keep)
        with self.consumers.holding(self.consumers.copies(space.into)):
            self.choose_(space, gathered, scores, width)
            self.refit_(space, gathered)
            values = self.consumers.copies(space.into)
        self.keep = keep
        self.consumers.forget(space.into)
        return values

    def scores(self, passes: Passes, mixture: Mixture, names: Collection[str]) -> dict[tuple[int, str], Tensor]:
        """Scores of the units of the dense model that compare over layers and spaces, by layer and name of the space,
        shape `(units,)`; nothing is changed.
        """
        scores = {}
        for layer in tqdm(range(self.arch.num_layers), desc="ranking", unit="layer"):
            with self.placement.at(layer):
                for space in self.arch.at(layer):
                    if space.kind in names:
                        scores[space.key] = self._comparable(space, passes, mixture)
                passes.advance(layer)
        return scores

    def snapshot(self) -> Snapshot:
        """Copies of what has changed so far."""
        spaces = [space for space in self.arch.spaces if space.key in self.keep]
        values = self.consumers.copies(axis for space in spaces for axis in space.into)
        return Snapshot(dict(self.keep), values)

    def restore_(self, snapshot: Snapshot) -> None:
        """Go back to a snapshot of this run, or take one of an earlier run of the same rounds into the dense model."""
        self.keep = dict(snapshot.keep)
        self.consumers.restore_(snapshot.consumers)

    def undo_(self) -> None:
        """Make the model dense again, unless units have been removed for good."""
        if not self.shrunk:
            self.consumers.undo_()

    def fill_layer_(self, layer: int, tensors: Mapping[str, Tensor], skeleton: PreTrainedModel) -> None:
        """Give a layer what an earlier run has made of it."""
        self.shrunk = True
        fill_layer_(self.model, self.arch, layer, tensors, skeleton)
        self.consumers.forget(axis for space in self.arch.at(layer) for axis in space.into)

    def _criterion(self, layer: int) -> Criterion:
        # It is made anew for each layer, so that its random draws do not depend on the layers before: a run that goes
        # on where another was killed does not score those again.
        config = replace(self.config, seed=(self.config.seed + layer) % 2**32)
        return CRITERIA.get(config.scored_by)(config)

    def _before(self, space: Space) -> tuple[int, ...]:
        return self.keep.get(space.key, tuple(range(space.size)))

    def _present(self, criterion: Criterion, space: Space, axis: Axis, moments: Moments) -> tuple[Tensor, Moments]:
        """What a criterion scores: the present weight of the units that are left, and their moments."""
        weight = self.consumers.present(axis)[0]
        if criterion.needs_producer_norms:
            moments = replace(moments, producer_norms=producer_norms(self.model, self.arch, space))
        if (before := self._before(space)) and len(before) < space.size:
            columns = units_to_columns(before, axis, weight.device)
            weight, moments = weight[:, columns], moments.select(columns)
        return weight, moments

    def _comparable(self, space: Space, passes: Passes, mixture: Mixture) -> Tensor:
        """Scores of the units of a space that compare over layers, shape `(units,)`."""
        criterion, by_consumer = self._criterion(space.layer), []
        pools = [Pool(mixture, self.consumers.present(axis)[0]) for axis in space.into]
        gathered = pooled(passes, space, criterion.needs_gram, pools)
        for axis, of_consumer in zip(space.into, gathered, strict=True):
            weight, moments = self._present(criterion, space, axis, of_consumer)
            columns = criterion.score(weight, moments, 1)
            check_scores(columns, weight.shape[1], self.config.scored_by, axis.module)
            by_consumer.append(standardised(columns, axis.per_unit).cpu())
        return torch.stack(by_consumer).mean(0)
