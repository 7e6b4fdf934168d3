"""The units of a model that are kept, one space after the other, and the weights that read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..arch.spec import ArchSpec, Axis, Space
from ..calibration.linalg import ridge_strength
from ..calibration.passes import Passes
from ..config.pruning import StructPruneConfig
from ..criteria import CRITERIA, Criterion
from ..criteria.mixture import Mixture, Pool, Pooled, Scoring, output_energy, pooled
from ..criteria.obs import producer_norms
from ..errors import StructPruneError
from ..forward.placement import Placement
from ..record.details import Choice, Choices, choice_of
from ..surgery.consumers import Consumers, Values, units_to_columns
from ..surgery.plan import Plan, best_units
from ..surgery.refit import REFITS, squared_errors


Keep = Mapping[tuple[int, str], tuple[int, ...]]


@dataclass(frozen=True)
class Snapshot:
    """What the rounds have reached.

    Attributes:
        keep: The kept units, by layer and space.
        consumers: The values of the consumers of these spaces.
        choices: How these units were chosen, in summary, by layer and space.
    """

    keep: Keep
    consumers: Mapping[Axis, Values]
    choices: Choices = field(default_factory=dict)


class Units:
    """Chooses the units of one space at a time, and masks all others.

    Attributes:
        keep: The kept units so far, by layer and space.
        choices: How they were chosen, in summary, by layer and space.
        placement: Brings in the layers that are offloaded, one at a time.
        consumers: The consumers, with the dense values of those that have been changed.
        shrunk: Whether a layer has lost its removed units for good.
    """

    def __init__(self, model: PreTrainedModel, arch: ArchSpec, config: StructPruneConfig):
        self.model, self.arch, self.config = model, arch, config
        self.keep: dict[tuple[int, str], tuple[int, ...]] = {}
        self.choices: dict[tuple[int, str], Choice] = {}
        self.placement = Placement(model, arch)
        self.consumers = Consumers(model, self.placement)
        self.shrunk = False

    @property
    def gram(self) -> bool:
        """Whether scores or refits take Gram matrices."""
        return CRITERIA.get(self.config.scored_by).needs_gram or self.config.correlates

    @property
    def plan(self) -> Plan:
        """The kept units, as a value."""
        return Plan(self.arch.model_type, dict(self.keep))

    def gather(self, passes: Passes, space: Space, mixture: Mixture) -> list[Pooled]:
        """What the samples say of a space, from its dense consumers and their present weights.

        Returns:
            The scores of the units that are left, and the moments of the domain mixture, by consumer.
        """
        before, criterion = self._before(space), self._criterion(space.layer)
        norms = self._producer_norms(criterion, space)
        pools = []
        for axis in space.into:
            dense, present, columns = self.consumers.dense(axis)[0], self.consumers.present(axis)[0], None
            if len(before) < space.size:
                columns = units_to_columns(before, axis, present.device)
                present = present[:, columns]
            pools.append(Pool(mixture, dense, Scoring(criterion, present, axis.per_unit, columns, norms)))
        # A refit starts from the dense weights, so error feedback has to see the error that these leave.
        with self.consumers.as_dense(space.into):
            return pooled(passes.gather(space.layer, space, self.gram), pools)

    def trial(self, space: Space, gathered: Sequence[Pooled], width: int) -> dict[Axis, Values]:
        """The values of the consumers of one space if it kept so many units; the model is left as it is."""
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
        values = self.consumers.copies(axis for space in spaces for axis in space.into)
        return Snapshot(dict(self.keep), values, dict(self.choices))

    def restore_(self, snapshot: Snapshot) -> None:
        """Go back to a snapshot of this run."""
        self.keep, self.choices = dict(snapshot.keep), dict(snapshot.choices)
        self.consumers.restore_(snapshot.consumers)

    def resume_(self, snapshot: Snapshot) -> None:
        """Take a snapshot of an earlier run of the same rounds into the dense model."""
        self.keep, self.choices = dict(snapshot.keep), dict(snapshot.choices)
        self.consumers.resume_(snapshot.consumers)

    def _criterion(self, layer: int) -> Criterion:
        # Made anew for each layer, so that what it draws at random does not depend on the layers before, which a run
        # that goes on where another was killed does not score again.
        config = replace(self.config, seed=self.config.seed + layer)
        return CRITERIA.get(config.scored_by)(config)

    def _producer_norms(self, criterion: Criterion, space: Space) -> Tensor | None:
        return producer_norms(self.model, self.arch, space) if criterion.needs_producer_norms else None

    def _before(self, space: Space) -> tuple[int, ...]:
        return self.keep.get((space.layer, space.name), tuple(range(space.size)))

    def _choose_(self, space: Space, gathered: Sequence[Pooled], width: int, note: bool = False) -> None:
        before, refit = self._before(space), REFITS[self.config.refit]
        criterion = self._criterion(space.layer)
        for axis, of_one in zip(space.into, gathered, strict=True):
            self._check_scores(axis, of_one.scores, len(before))
        scores = torch.stack([of_one.scores for of_one in gathered]).sum(0)
        keep = tuple(before[unit] for unit in best_units(scores, width))
        if len(space.into) == 1:
            (axis,), (of_one,) = space.into, gathered
            dense, others = self.consumers.dense(axis)[0], sorted({*before} - {*keep})
            keep = criterion.exchanged(keep, others, dense, of_one.moments, axis.per_unit)
        self.keep[space.layer, space.name] = keep
        errors = []
        for axis, of_one in zip(space.into, gathered, strict=True):
            weight, bias = self.consumers.dense(axis)
            columns = units_to_columns(keep, axis, weight.device)
            start = criterion.unfitted(weight, of_one.moments) if self.config.refit == "none" else weight
            damping = ridge_strength(self.config.damping, len(columns), of_one.moments.count)
            refitted = refit(start, bias, of_one.moments, columns, damping)
            if note and of_one.moments.gram is not None:
                left = squared_errors(weight, bias, of_one.moments, columns, *refitted)
                errors.append((*left, output_energy(weight, of_one.moments)))
            self.consumers.mask_(axis, columns, *refitted)
        # A round that removes nothing here says no more of the units.
        if note and width < len(before):
            chosen = torch.isin(torch.tensor(before), torch.tensor(keep))
            self.choices[space.layer, space.name] = _summary(scores, chosen, gathered, errors)

    def _check_scores(self, axis: Axis, scores: Tensor, units: int) -> None:
        if scores.shape != (units,) or not torch.isfinite(scores).all():
            kind = f"the shape {tuple(scores.shape)}" if scores.shape != (units,) else "NaN or infinite values"
            raise StructPruneError(
                f"The criterion {self.config.scored_by!r} has to give {units} finite scores, one per unit, at "
                f"{axis.module}; it gives {kind}."
            )


def _summary(
    scores: Tensor, kept: Tensor, gathered: Sequence[Pooled], errors: Sequence[tuple[float, float, float]]
) -> Choice:
    """What is noted of a choice: sums over the consumers of the space, where all of them know."""
    carried = [of_one.carried for of_one in gathered if of_one.carried is not None]
    every = len(gathered)
    return choice_of(
        scores,
        kept,
        torch.stack(carried).sum(0) if len(carried) == every else None,
        tuple(map(sum, zip(*errors, strict=True))) if len(errors) == every else None,
    )
