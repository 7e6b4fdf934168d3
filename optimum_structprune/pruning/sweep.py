"""One pass over the layers of a model: gather, score, choose, refit, and in the end shrink."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers.utils.logging import tqdm

from ..arch.spec import ArchSpec, Axis, Space, Widths
from ..calibration.moments import Moments
from ..calibration.passes import Passes
from ..criteria import CRITERIA, Criterion
from ..criteria.aggregate import standardised
from ..criteria.mixture import Mixture
from ..errors import StructPruneError
from ..surgery.consumers import Consumers, Values, units_to_columns
from ..surgery.cut import shrink_layer_
from ..surgery.plan import Plan, best_units
from ..surgery.refit import REFITS


if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..config.pruning import StructPruneConfig

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
        consumers: The consumers, with the dense values of those that have been changed.
        shrunk: Whether a layer has lost its removed units for good.
    """

    def __init__(self, model: PreTrainedModel, arch: ArchSpec, config: StructPruneConfig):
        self.model, self.arch, self.config = model, arch, config
        self.keep: dict[tuple[int, str], tuple[int, ...]] = {}
        self.consumers = Consumers(model)
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
        self, passes: Passes, mixture: Mixture, widths: Widths, smaller: PreTrainedModel | None, title: str
    ) -> None:
        """One round.

        Args:
            passes: The passes over the calibration samples.
            mixture: How the domains are brought together.
            widths: How many units are kept, by space, in every layer or by layer.
            smaller: In the last round, the `skeleton` of the smaller model, whose layers are filled and take their
                places; None where units are only masked.
            title: The label of the progress bar.
        """
        criterion = self._criterion()
        for layer in tqdm(range(self.arch.num_layers), desc=title, unit="layer"):
            axes = [axis for space in self.arch.at(layer) for axis in space.into]
            with self.consumers.as_dense(axes):
                passes.advance_dense(layer, widths)
            for space in self.arch.at(layer):
                width = space.width_in(widths) * space.scale
                if width < space.size:
                    # A refit starts from the dense weights, so error feedback has to see the error that these leave.
                    with self.consumers.as_dense(space.into):
                        moments = passes.gather(layer, space, self.gram)
                    self._choose_(space, moments, width, mixture, criterion)
            if smaller is not None:
                self.shrunk = True
                shrink_layer_(self.model, self.arch, layer, self.plan, smaller)
                self.consumers.forget(axes)
            passes.advance(layer)

    def scores(self, passes: Passes, mixture: Mixture, names: Collection[str]) -> dict[tuple[int, str], Tensor]:
        """Scores of the units of the dense model that compare over layers and spaces; nothing is changed.

        Args:
            passes: The passes over the calibration samples.
            mixture: How the domains are brought together.
            names: The kinds of space.

        Returns:
            By layer and name of the space, shape `(units,)`.
        """
        criterion, scores = self._criterion(), {}
        for layer in tqdm(range(self.arch.num_layers), desc="ranking", unit="layer"):
            for space in self.arch.at(layer):
                if space.kind in names:
                    by_consumer = []
                    for axis, moments in zip(
                        space.into, passes.gather(layer, space, criterion.needs_gram), strict=True
                    ):
                        columns = mixture.scores(criterion, self.consumers.present(axis)[0], moments, 1)
                        by_consumer.append(standardised(columns, axis.per_unit).cpu())
                    scores[layer, space.name] = torch.stack(by_consumer).mean(0)
            passes.advance(layer)
        return scores

    def trial(
        self, space: Space, moments: Sequence[Sequence[Moments]], width: int, mixture: Mixture
    ) -> dict[Axis, Values]:
        """The values that the consumers of one space would get if it kept so many units; the model is left as it is.

        Args:
            space: The space, at its full width.
            moments: The moments of the inputs of its consumers, by consumer and domain.
            width: How many units are kept.
            mixture: How the domains are brought together.
        """
        keep = dict(self.keep)
        with self.consumers.holding(self.consumers.copies(space.into)):
            self._choose_(space, moments, width, mixture, self._criterion())
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

    def _criterion(self) -> Criterion:
        # Made anew for each round, so that what it draws at random does not depend on the rounds before.
        return CRITERIA.get(self.config.scored_by)(self.config)

    def _choose_(
        self,
        space: Space,
        moments: Sequence[Sequence[Moments]],
        width: int,
        mixture: Mixture,
        criterion: Criterion,
    ) -> None:
        key = (space.layer, space.name)
        before = self.keep.get(key, tuple(range(space.size)))
        pairs = list(zip(space.into, moments, strict=True))
        scores = [self._scores(axis, by_domain, before, mixture, criterion) for axis, by_domain in pairs]
        self.keep[key] = tuple(before[unit] for unit in best_units(torch.stack(scores).sum(0), width))
        refit = REFITS[self.config.refit]
        for axis, by_domain in pairs:
            weight, bias = self.consumers.dense(axis)
            columns = units_to_columns(self.keep[key], axis, weight.device)
            pooled = mixture.pool(weight, by_domain)
            self.consumers.mask_(axis, columns, *refit(weight, bias, pooled, columns, self.config.damping))

    def _scores(
        self, axis: Axis, moments: Sequence[Moments], units: Sequence[int], mixture: Mixture, criterion: Criterion
    ) -> Tensor:
        weight, _ = self.consumers.present(axis)
        if len(units) * axis.per_unit < weight.shape[1]:
            columns = units_to_columns(units, axis, weight.device)
            weight, moments = weight[:, columns], [of_domain.select(columns) for of_domain in moments]
        scores = mixture.scores(criterion, weight, moments, axis.per_unit)
        if scores.shape != (len(units),) or not torch.isfinite(scores).all():
            kind = f"the shape {tuple(scores.shape)}" if scores.shape != (len(units),) else "NaN or infinite values"
            raise StructPruneError(
                f"The criterion {self.config.scored_by!r} has to give {len(units)} finite scores, one per unit, at "
                f"{axis.module}; it gives {kind}."
            )
        return scores
