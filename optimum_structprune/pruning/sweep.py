"""One pass over the layers of a model: gather, score, choose, refit, and in the end shrink."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers.utils.logging import tqdm

from ..arch.load import layer_list
from ..arch.spec import ArchSpec, Axis, Space, Widths
from ..calibration.passes import Passes
from ..criteria import CRITERIA, Criterion
from ..criteria.aggregate import standardised
from ..criteria.mixture import Mixture, Pool, Pooled, Scoring, pooled
from ..errors import StructPruneError
from ..forward.placement import Placement
from ..surgery.consumers import Consumers, Values, units_to_columns
from ..surgery.cut import fill_layer_, shrink_layer_
from ..surgery.plan import Plan, best_units
from ..surgery.refit import REFITS


if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..config.pruning import StructPruneConfig
    from .progress import Progress

Keep = Mapping[tuple[int, str], tuple[int, ...]]


@dataclass(frozen=True)
class Snapshot:
    """What the rounds have reached.

    Attributes:
        keep: The kept units, by layer and space.
        consumers: The values of the consumers of these spaces.
    """

    keep: Keep
    consumers: Mapping[Axis, Values]


class Sweep:
    """Prunes the units inside the layers of a model, one round after the other.

    Between rounds, removed units are only masked. Every refit starts from the dense weights and aims at the dense
    layer's output on the present residual stream, so no error of an earlier round is fitted again. Scores, in
    contrast, are those of the refitted weights, in which a kept unit already makes up for units removed before.

    Args:
        model: The model that is changed.
        arch: Its description.
        config: How to prune.

    Attributes:
        keep: The kept units so far, by layer and space.
        placement: Brings in the layers that are offloaded, one at a time.
        consumers: The consumers, with the dense values of those that have been changed.
        shrunk: Whether a layer has lost its removed units for good.
    """

    def __init__(self, model: PreTrainedModel, arch: ArchSpec, config: StructPruneConfig):
        self.model, self.arch, self.config = model, arch, config
        self.keep: dict[tuple[int, str], tuple[int, ...]] = {}
        self.placement = Placement(model, arch)
        self.consumers = Consumers(model, self.placement)
        self.shrunk = False

    @property
    def gram(self) -> bool:
        """Whether scores or refits take Gram matrices."""
        return CRITERIA.get(self.config.scored_by).needs_gram or self.config.fits

    @property
    def plan(self) -> Plan:
        """The kept units, as a value."""
        return Plan(self.arch.model_type, dict(self.keep))

    def run_(
        self,
        passes: Passes,
        mixture: Mixture,
        widths: Widths,
        smaller: PreTrainedModel | None,
        title: str,
        progress: Progress | None = None,
    ) -> None:
        """One round.

        Args:
            passes: The passes over the calibration samples.
            mixture: How the domains are brought together.
            widths: How many units are kept, by space, in every layer or by layer.
            smaller: In the last round, the `skeleton` of the smaller model, whose layers are filled and take their
                places; None where units are only masked.
            title: The label of the progress bar.
            progress: Remembers the finished layers of the last round; None where nothing does.
        """
        every = range(self.arch.num_layers)
        done = 0 if progress is None or smaller is None else self._go_on_(progress, passes, smaller)
        for layer in tqdm(every[done:], desc=title, unit="layer", initial=done, total=len(every)):
            with self.placement.at(layer, changes=True):
                self._prune_layer_(layer, passes, mixture, widths, smaller)
                passes.advance(layer)
                if progress is not None and smaller is not None and (state := passes.state()) is not None:
                    progress.save(layer, self.plan, layer_list(self.model, self.arch)[layer].state_dict(), state)

    def scores(self, passes: Passes, mixture: Mixture, names: Collection[str]) -> dict[tuple[int, str], Tensor]:
        """Scores of the units of the dense model that compare over layers and spaces; nothing is changed.

        Args:
            passes: The passes over the calibration samples.
            mixture: How the domains are brought together.
            names: The kinds of space.

        Returns:
            By layer and name of the space, shape `(units,)`.
        """
        scores = {}
        for layer in tqdm(range(self.arch.num_layers), desc="ranking", unit="layer"):
            with self.placement.at(layer):
                for space in self.arch.at(layer):
                    if space.kind in names:
                        scores[layer, space.name] = self._comparable(space, passes, mixture)
                passes.advance(layer)
        return scores

    def gather(self, passes: Passes, space: Space, mixture: Mixture) -> list[Pooled]:
        """What the samples say of a space, from its dense consumers and their present weights.

        Args:
            passes: The passes over the calibration samples, at the layer of the space.
            space: The space.
            mixture: How the domains are brought together.

        Returns:
            The scores of the units that are left, and the moments of the domain mixture, by consumer.

        Raises:
            StructPruneError: If a criterion does not give one finite score for each unit.
        """
        before, criterion = self._before(space), self._criterion(space.layer)
        pools = []
        for axis in space.into:
            dense, present, columns = self.consumers.dense(axis)[0], self.consumers.present(axis)[0], None
            if len(before) < space.size:
                columns = units_to_columns(before, axis, present.device)
                present = present[:, columns]
            pools.append(Pool(mixture, dense, Scoring(criterion, present, axis.per_unit, columns)))
        # A refit starts from the dense weights, so error feedback has to see the error that these leave.
        with self.consumers.as_dense(space.into):
            found = pooled(passes.gather(space.layer, space, self.gram), pools)
        for axis, of_one in zip(space.into, found, strict=True):
            self._check_scores(axis, of_one.scores, len(before))
        return found

    def trial(self, space: Space, gathered: Sequence[Pooled], width: int) -> dict[Axis, Values]:
        """The values that the consumers of one space would get if it kept so many units; the model is left as it is.

        Args:
            space: The space, at its full width.
            gathered: What `gather` gave for it.
            width: How many units are kept.
        """
        keep = dict(self.keep)
        with self.consumers.holding(self.consumers.copies(space.into)):
            self._choose_(space, gathered, width)
            values = self.consumers.copies(space.into)
        self.keep = keep
        self.consumers.forget(space.into)
        return values

    def snapshot(self) -> Snapshot:
        """Copies of what has changed so far."""
        spaces = [space for space in self.arch.spaces if (space.layer, space.name) in self.keep]
        return Snapshot(dict(self.keep), self.consumers.copies(axis for space in spaces for axis in space.into))

    def restore_(self, snapshot: Snapshot) -> None:
        """Go back to a snapshot of this run."""
        self.keep = dict(snapshot.keep)
        self.consumers.restore_(snapshot.consumers)

    def resume_(self, snapshot: Snapshot) -> None:
        """Take a snapshot of an earlier run of the same rounds into the dense model."""
        self.keep = dict(snapshot.keep)
        self.consumers.resume_(snapshot.consumers)

    def _criterion(self, layer: int) -> Criterion:
        # Made anew for each layer, so that what it draws at random does not depend on the layers before, which a run
        # that goes on where another was killed does not score again.
        config = replace(self.config, seed=self.config.seed + layer)
        return CRITERIA.get(config.scored_by)(config)

    def _go_on_(self, progress: Progress, passes: Passes, smaller: PreTrainedModel) -> int:
        """Take over the layers that an earlier run has finished, and return their number."""
        finished = progress.load()
        if finished is None:
            return 0
        for layer in range(finished.layers):
            with self.placement.at(layer, changes=True):
                self.shrunk = True
                fill_layer_(self.model, self.arch, layer, progress.tensors(layer), smaller)
        self.keep = dict(finished.plan.keep)
        for layer in range(finished.layers):
            self.consumers.forget(axis for space in self.arch.at(layer) for axis in space.into)
        passes.resume_(finished.passes)
        return finished.layers

    def _prune_layer_(
        self, layer: int, passes: Passes, mixture: Mixture, widths: Widths, smaller: PreTrainedModel | None
    ) -> None:
        axes = [axis for space in self.arch.at(layer) for axis in space.into]
        with self.consumers.as_dense(axes):
            passes.advance_dense(layer, widths)
        for space in self.arch.at(layer):
            width = space.width_in(widths) * space.scale
            if width < space.size:
                # What was gathered is let go before the next space: a Gram matrix takes gigabytes.
                self._choose_(space, self.gather(passes, space, mixture), width)
        if smaller is not None:
            self.shrunk = True
            shrink_layer_(self.model, self.arch, layer, self.plan, smaller)
            self.consumers.forget(axes)

    def _comparable(self, space: Space, passes: Passes, mixture: Mixture) -> Tensor:
        """Scores of the units of a space that compare over layers, shape `(units,)`."""
        criterion = self._criterion(space.layer)
        weights = [self.consumers.present(axis)[0] for axis in space.into]
        pools = [Pool(mixture, weight, Scoring(criterion, weight, 1)) for weight in weights]
        found = pooled(passes.gather(space.layer, space, criterion.needs_gram), pools)
        by_consumer = [
            standardised(of_one.scores, axis.per_unit).cpu() for axis, of_one in zip(space.into, found, strict=True)
        ]
        return torch.stack(by_consumer).mean(0)

    def _before(self, space: Space) -> tuple[int, ...]:
        return self.keep.get((space.layer, space.name), tuple(range(space.size)))

    def _choose_(self, space: Space, gathered: Sequence[Pooled], width: int) -> None:
        before, refit = self._before(space), REFITS[self.config.refit]
        scores = torch.stack([of_one.scores for of_one in gathered]).sum(0)
        keep = tuple(before[unit] for unit in best_units(scores, width))
        self.keep[space.layer, space.name] = keep
        for axis, of_one in zip(space.into, gathered, strict=True):
            weight, bias = self.consumers.dense(axis)
            columns = units_to_columns(keep, axis, weight.device)
            self.consumers.mask_(axis, columns, *refit(weight, bias, of_one.moments, columns, self.config.damping))

    def _check_scores(self, axis: Axis, scores: Tensor, units: int) -> None:
        if scores.shape != (units,) or not torch.isfinite(scores).all():
            kind = f"the shape {tuple(scores.shape)}" if scores.shape != (units,) else "NaN or infinite values"
            raise StructPruneError(
                f"The criterion {self.config.scored_by!r} has to give {units} finite scores, one per unit, at "
                f"{axis.module}; it gives {kind}."
            )
