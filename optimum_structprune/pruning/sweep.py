"""The heart of a pruning: gather, score, choose, refit and shrink, one layer after the other."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils.logging import tqdm

from ..arch.load import layer_list
from ..arch.spec import ArchSpec, Axis, Space, Widths
from ..calibration.linalg import ridge_strength
from ..calibration.passes import Passes, PassesState
from ..config.pruning import StructPruneConfig
from ..criteria import CRITERIA, Criterion
from ..criteria.mixture import Mixture, Pool, Pooled, Scoring, output_energy, pooled, standardised
from ..criteria.obs import producer_norms
from ..errors import StructPruneError
from ..forward.placement import Placement
from ..record.details import Choice, Choices, choice_of, choices_of_list, choices_to_list
from ..surgery.consumers import Consumers, Values, units_to_columns
from ..surgery.cut import fill_layer_, shrink_layer_
from ..surgery.plan import Plan, best_units
from ..surgery.refit import REFITS, squared_errors
from ..system.resume import Resume


Keep = Mapping[tuple[int, str], tuple[int, ...]]


@dataclass(frozen=True)
class Snapshot:
    """What a sweep has reached.

    Attributes:
        keep: The kept units, by layer and space.
        consumers: The values of the consumers of these spaces.
        choices: How these units were chosen, in summary, by layer and space.
    """

    keep: Keep
    consumers: Mapping[Axis, Values]
    choices: Choices = field(default_factory=dict)


class Sweep:
    """Prunes the units inside the layers of a model, in one pass over the layers or in several.

    Between passes, removed units are only masked. Every refit starts from the dense weights and aims at the dense
    layer's output on the present residual stream, so no error of an earlier pass is fitted again. Scores, in contrast,
    are those of the refitted weights, in which a kept unit already makes up for units removed before.

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
        store: Resume | None = None,
        number: int = 1,
        rounds: int = 1,
    ) -> None:
        """One pass over the layers, the `number`-th of `rounds`.

        With `smaller`, the `skeleton` of the smaller model, each layer loses its removed units as soon as it is
        finished, and `store` remembers it; without it they are only masked.
        """
        every = range(self.arch.num_layers)
        store = None if smaller is None else store
        done = self._go_on_(store, passes, smaller) if store is not None and smaller is not None else 0
        before = (number - 1) * len(every)  # the bar counts the layers of all rounds, for the time that is left
        total = max(rounds, number) * len(every)
        for layer in tqdm(every[done:], desc=title, unit="layer", initial=before + done, total=total):
            with self.placement.at(layer, changes=True):
                self.prune_layer_(layer, passes, mixture, widths, smaller)
                passes.advance(layer)
                if store is not None and (state := passes.state()) is not None:
                    choices = choices_to_list(self.choices)
                    values = {"plan": self.plan.to_dict(), "passes": state.values, "choices": choices}
                    store.save(layer + 1, values, layer_list(self.model, self.arch)[layer].state_dict(), state.tensors)

    def prune_layer_(
        self, layer: int, passes: Passes, mixture: Mixture, widths: Widths, smaller: PreTrainedModel | None
    ) -> None:
        """Bring one layer to its widths, and where there is a smaller model, to the size that it has there."""
        axes = [axis for space in self.arch.at(layer) for axis in space.into]
        with self.consumers.as_dense(axes):
            passes.advance_dense(layer, widths)
        for space in self.arch.at(layer):
            width = space.width_in(widths) * space.scale
            if width < space.size:
                # What was gathered is let go before the next space: a Gram matrix takes gigabytes.
                self.prune_space_(space, self.gather(passes, space, mixture), width, note=True)
        if smaller is not None:
            self.shrunk = True
            shrink_layer_(self.model, self.arch, layer, self.plan, smaller)
            self.consumers.forget(axes)

    def prune_space_(self, space: Space, gathered: Sequence[Pooled], width: int, note: bool = False) -> None:
        """Choose the units of a space that stay, and let its consumers make up for the others; with `note`, say how
        they were chosen.
        """
        before = self._before(space)
        scores = self._scores(space, gathered, len(before))
        keep = self._chosen(space, gathered, scores, width)
        errors = self._refit_(space, gathered, keep, measure=note)
        self.keep[space.key] = keep
        # A pass that removes nothing here says no more of the units.
        if note and width < len(before):
            chosen = torch.isin(torch.tensor(before), torch.tensor(keep))
            self.choices[space.key] = _summary(chosen, gathered, errors)

    def gather(self, passes: Passes, space: Space, mixture: Mixture) -> list[Pooled]:
        """What the samples say of a space, by consumer: the scores of the units that are left by the present weights,
        and the moments of the domain mixture.
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
        gram = criterion.needs_gram or self.config.correlates
        # A refit starts from the dense weights, so error feedback has to see the error that these leave.
        with self.consumers.as_dense(space.into):
            return pooled(passes.gather(space.layer, space, gram), pools)

    def trial(self, space: Space, gathered: Sequence[Pooled], width: int) -> dict[Axis, Values]:
        """The values of the consumers of one space if it kept so many units; the model is left as it is."""
        keep = dict(self.keep)
        with self.consumers.holding(self.consumers.copies(space.into)):
            self.prune_space_(space, gathered, width)
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
        return Snapshot(dict(self.keep), values, dict(self.choices))

    def restore_(self, snapshot: Snapshot) -> None:
        """Go back to a snapshot of this run."""
        self.keep, self.choices = dict(snapshot.keep), dict(snapshot.choices)
        self.consumers.restore_(snapshot.consumers)

    def resume_(self, snapshot: Snapshot) -> None:
        """Take a snapshot of an earlier run of the same rounds into the dense model."""
        self.keep, self.choices = dict(snapshot.keep), dict(snapshot.choices)
        self.consumers.resume_(snapshot.consumers)

    def undo_(self) -> None:
        """Make the model dense again, unless units have been removed for good."""
        if not self.shrunk:
            self.consumers.undo_()

    def _go_on_(self, store: Resume, passes: Passes, smaller: PreTrainedModel) -> int:
        """Take over the layers that an earlier run has finished, and return their number."""
        saved = store.load()
        if saved is None:
            return 0
        with store.readable():
            self.keep = dict(Plan.from_dict(saved.values["plan"]).keep)
            self.choices = choices_of_list(saved.values["choices"])
            state = PassesState(saved.own, dict(saved.values["passes"]))
        for layer in range(saved.number):
            with self.placement.at(layer, changes=True):
                tensors = store.tensors(layer + 1)
                self.shrunk = True
                fill_layer_(self.model, self.arch, layer, tensors, smaller)
            self.consumers.forget(axis for space in self.arch.at(layer) for axis in space.into)
        passes.resume_(state)
        return saved.number

    def _criterion(self, layer: int) -> Criterion:
        # Made anew for each layer, so that what it draws at random does not depend on the layers before, which a run
        # that goes on where another was killed does not score again.
        config = replace(self.config, seed=self.config.seed + layer)
        return CRITERIA.get(config.scored_by)(config)

    def _producer_norms(self, criterion: Criterion, space: Space) -> Tensor | None:
        return producer_norms(self.model, self.arch, space) if criterion.needs_producer_norms else None

    def _before(self, space: Space) -> tuple[int, ...]:
        return self.keep.get(space.key, tuple(range(space.size)))

    def _scores(self, space: Space, gathered: Sequence[Pooled], units: int) -> Tensor:
        """The scores of the units that are left, the sum over the consumers of the space, shape `(units,)`."""
        for axis, of_consumer in zip(space.into, gathered, strict=True):
            scores = of_consumer.scores
            if scores.shape != (units,) or not torch.isfinite(scores).all():
                kind = f"the shape {tuple(scores.shape)}" if scores.shape != (units,) else "NaN or infinite values"
                raise StructPruneError(
                    f"The criterion {self.config.scored_by!r} has to give {units} finite scores, one per unit, at "
                    f"{axis.module}; it gives {kind}."
                )
        return torch.stack([of_consumer.scores for of_consumer in gathered]).sum(0)

    def _chosen(self, space: Space, gathered: Sequence[Pooled], scores: Tensor, width: int) -> tuple[int, ...]:
        """The units with the highest scores, or those that the criterion takes in their place."""
        before = self._before(space)
        keep = tuple(before[unit] for unit in best_units(scores, width))
        if len(space.into) > 1:
            return keep
        (axis,), (of_consumer,) = space.into, gathered
        others = sorted({*before} - {*keep})
        dense = self.consumers.dense(axis)[0]
        return self._criterion(space.layer).exchanged(keep, others, dense, of_consumer.moments, axis.per_unit)

    def _refit_(
        self, space: Space, gathered: Sequence[Pooled], keep: Sequence[int], measure: bool
    ) -> list[tuple[float, float, float]]:
        """Give each consumer of a space its refitted columns and mask the others.

        With `measure`, the result has the squared error of each consumer's output without a refit, the one with it,
        and the energy of the output.
        """
        criterion, errors = self._criterion(space.layer), []
        for axis, of_consumer in zip(space.into, gathered, strict=True):
            moments = of_consumer.moments
            weight, bias = self.consumers.dense(axis)
            columns = units_to_columns(keep, axis, weight.device)
            start = criterion.unfitted(weight, moments) if self.config.refit == "none" else weight
            ridge = ridge_strength(self.config.damping, len(columns), moments.count)
            refitted = REFITS.get(self.config.refit)(start, bias, moments, columns, ridge)
            if measure and moments.gram is not None:
                squared = squared_errors(weight, bias, moments, columns, *refitted)
                errors.append((*squared, output_energy(weight, moments)))
            self.consumers.mask_(axis, columns, *refitted)
        return errors

    def _comparable(self, space: Space, passes: Passes, mixture: Mixture) -> Tensor:
        """Scores of the units of a space that compare over layers, shape `(units,)`."""
        criterion = self._criterion(space.layer)
        weights = [self.consumers.present(axis)[0] for axis in space.into]
        norms = self._producer_norms(criterion, space)
        pools = [Pool(mixture, weight, Scoring(criterion, weight, 1, producer_norms=norms)) for weight in weights]
        gathered = pooled(passes.gather(space.layer, space, criterion.needs_gram), pools)
        by_consumer = [
            standardised(of_consumer.scores, axis.per_unit).cpu()
            for axis, of_consumer in zip(space.into, gathered, strict=True)
        ]
        return torch.stack(by_consumer).mean(0)


def _summary(kept: Tensor, gathered: Sequence[Pooled], errors: Sequence[tuple[float, float, float]]) -> Choice:
    """What is noted of a choice: sums over the consumers of the space, where all of them know."""
    carried = [of_consumer.carried for of_consumer in gathered if of_consumer.carried is not None]
    every = len(gathered)
    return choice_of(
        kept,
        torch.stack(carried).sum(0) if len(carried) == every else None,
        tuple(map(sum, zip(*errors, strict=True))) if len(errors) == every else None,
    )
