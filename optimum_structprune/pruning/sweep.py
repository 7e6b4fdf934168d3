"""One round: layer by layer, gather, score, choose, refit, shrink."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
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
from ..surgery.consumers import read_consumer, units_to_columns, write_consumer_
from ..surgery.cut import shrink_layer_
from ..surgery.plan import Plan
from ..surgery.refit import REFITS


if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..config.pruning import StructPruneConfig


Consumers = Mapping[Axis, "tuple[Tensor, Tensor | None]"]


@dataclass(frozen=True)
class Snapshot:
    """What the rounds have reached.

    Attributes:
        keep: Kept units, by layer and space.
        consumers: Weight and bias of the consumers of these spaces.
        shares: Weights of the domains in the next round.
    """

    keep: Mapping[tuple[int, str], tuple[int, ...]]
    consumers: Consumers
    shares: tuple[float, ...]


@dataclass
class Sweep:
    """Prunes a model in place, one round after the other.

    Between rounds, removed units are only masked (their columns in the consumers are zero), and the dense consumers
    are remembered. So every refit starts from the dense weights and aims at the dense layer's output on the present
    stream: no error of an earlier round is fitted again. Scores, in contrast, judge the refitted weights, in which a
    kept unit already carries the load of those removed before.

    Attributes:
        model: The model that is changed.
        arch: Its description.
        config: How to prune.
        mixture: How the evidence of the domains is brought together.
        keep: What is kept so far.
        dense: Dense weight and bias of the consumers that earlier rounds have changed.
        saliency: E|x ∂L/∂x| by tap, shape `(domains, n)`, for a criterion that needs gradients.
    """

    model: PreTrainedModel
    arch: ArchSpec
    config: StructPruneConfig
    mixture: Mixture
    keep: dict[tuple[int, str], tuple[int, ...]] = field(default_factory=dict)
    dense: dict[Axis, tuple[Tensor, Tensor | None]] = field(default_factory=dict)
    saliency: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.begin_()
        self.gram = self.criterion.needs_gram or self.config.fits

    def begin_(self) -> None:
        """Make the criterion anew, so that what it draws at random in a round does not depend on those before."""
        self.criterion: Criterion = CRITERIA.get(self.config.scored_by)(self.config)

    def run_(self, passes: Passes, widths: Widths, smaller: PreTrainedModel | None, title: str) -> None:
        """One round.

        Args:
            passes: The calibration data.
            widths: Number of units to keep, by space, in every layer or by layer.
            smaller: In the last round, the `skeleton` of the shrunk model, into which the layers move.
            title: Label of the progress bar.
        """
        self.begin_()
        for layer in tqdm(range(self.arch.num_layers), desc=title, unit="layer"):
            with self._dense_weights(axis for space in self.arch.at(layer) for axis in space.into):
                passes.follow(layer, widths)
            for space in self.arch.at(layer):
                width = space.width_in(widths) * space.scale
                if width < space.size:
                    self._prune_(space, passes, width, smaller is None)
            if smaller is not None:
                shrink_layer_(self.model, self.arch, layer, self.plan, smaller)
            passes.advance(layer)

    def _dense_weights(self, axes: Iterable[Axis]) -> AbstractContextManager[None]:
        """Consumers that are for a while as dense as they were at first."""
        return self.holding({axis: self.dense[axis] for axis in axes if axis in self.dense})

    @contextmanager
    def holding(self, consumers: Consumers) -> Iterator[None]:
        """Consumers that have other weights and biases for a while."""
        now = {axis: read_consumer(self.model, axis) for axis in consumers}
        for axis in now:
            self._write_(axis, *consumers[axis])
        try:
            yield
        finally:
            for axis, values in now.items():
                self._write_(axis, *values)

    def scores(self, passes: Passes, names: Collection[str]) -> dict[tuple[int, str], Tensor]:
        """Scores of the units of the dense model that compare over layers and spaces; nothing is changed.

        Args:
            passes: The calibration data.
            names: Kinds of space.
        """
        found = {}
        for layer in tqdm(range(self.arch.num_layers), desc="ranking", unit="layer"):
            for space in self.arch.at(layer):
                if space.kind in names:
                    evidence = passes.gather(layer, space, self.criterion.needs_gram)
                    parts = [self._standardised(*pair) for pair in zip(space.into, evidence, strict=True)]
                    found[layer, space.name] = torch.stack(parts).mean(0)
            passes.advance(layer)
        return found

    def trial(self, space: Space, evidence: Sequence[Sequence[Moments]], width: int) -> Consumers:
        """What the consumers of one space would become if it kept so many units; the model is left as it is.

        Args:
            space: The space, whole so far.
            evidence: Moments of the inputs of its consumers, by consumer and domain.
            width: Number of units to keep.
        """
        keep, now = dict(self.keep), {axis: read_consumer(self.model, axis) for axis in space.into}
        with self.holding(now):
            self._choose_(space, evidence, width, remember=False)
            found = {axis: read_consumer(self.model, axis) for axis in space.into}
        self.keep = keep
        return found

    def remove_experts_(self, passes: Passes, widths: Widths, smaller: PreTrainedModel) -> None:
        """Take whole experts out of every layer.

        Nothing short of that silences an expert, since a router is a softmax over logits: there is no weight that
        makes one minus infinity. So this is done once, before the rounds, and the layers move at once.

        Args:
            passes: The calibration data.
            widths: Number of experts to keep, by space.
            smaller: The `skeleton` of the model without them.
        """
        for layer in tqdm(range(self.arch.num_layers), desc="experts", unit="layer"):
            for space in self.arch.at(layer):
                if space.kind in widths:
                    found = passes.contributions(layer, space)
                    width = space.width_in(widths)
                    scores = self.mixture.judge_experts(found)
                    self.keep[layer, space.name] = _best(scores, width)
            shrink_layer_(self.model, self.arch, layer, self.plan, smaller)
            passes.advance(layer)

    @property
    def plan(self) -> Plan:
        """What is kept, as a value."""
        return Plan(self.arch.model_type, dict(self.keep))

    def snapshot(self) -> Snapshot:
        """Copies of what has changed so far, in fp32."""
        axes = [axis for space in self.arch.spaces if (space.layer, space.name) in self.keep for axis in space.into]
        consumers = {axis: read_consumer(self.model, axis) for axis in axes}
        return Snapshot(dict(self.keep), consumers, self.mixture.shares)

    def restore_(self, snapshot: Snapshot) -> None:
        """Go back to a snapshot; consumers that it does not name become dense again."""
        self.keep, self.mixture.shares = dict(snapshot.keep), snapshot.shares
        for axis in {**self.dense, **snapshot.consumers}:
            self._write_(axis, *(snapshot.consumers.get(axis) or self.dense[axis]))

    def _write_(self, axis: Axis, weight: Tensor, bias: Tensor | None) -> None:
        """All columns of a consumer; no bias is a bias of zeros where the module has got one."""
        _, now = read_consumer(self.model, axis)
        bias = torch.zeros_like(now) if bias is None and now is not None else bias
        write_consumer_(self.model, axis, torch.arange(weight.shape[1], device=weight.device), weight, bias)

    def resume_(self, snapshot: Snapshot) -> None:
        """Take a snapshot of an earlier run of the same rounds into the dense model."""
        self.dense = {axis: read_consumer(self.model, axis) for axis in snapshot.consumers}
        self.restore_(snapshot)

    def _prune_(self, space: Space, passes: Passes, width: int, remember: bool) -> None:
        # A refit starts from the dense weights, so what it is to correct is the error that these leave.
        with self._dense_weights(space.into):
            evidence = passes.gather(space.layer, space, self.gram)
        self._choose_(space, evidence, width, remember)

    def _choose_(self, space: Space, evidence: Sequence[Sequence[Moments]], width: int, remember: bool) -> None:
        key = (space.layer, space.name)
        before = self.keep.get(key, tuple(range(space.size)))
        pairs = list(zip(space.into, evidence, strict=True))
        scores = [self._score(axis, parts, before) for axis, parts in pairs]
        self.keep[key] = tuple(before[i] for i in _best(torch.stack(scores).sum(0), width))
        for axis, parts in pairs:
            self._refit_(axis, parts, key, remember)

    def _score(self, axis: Axis, parts: Sequence[Moments], units: Sequence[int]) -> Tensor:
        weight, _ = read_consumer(self.model, axis)
        parts = self._seen(axis, parts)
        if len(units) * axis.per_unit < weight.shape[1]:
            columns = units_to_columns(units, axis, weight.device)
            weight, parts = weight[:, columns], [part.select(columns) for part in parts]
        return self.mixture.judge(self.criterion, weight, parts, axis.per_unit)

    def _standardised(self, axis: Axis, parts: Sequence[Moments]) -> Tensor:
        weight, _ = read_consumer(self.model, axis)
        columns = self.mixture.judge(self.criterion, weight, self._seen(axis, parts), 1)
        return standardised(columns, axis.per_unit).cpu()

    def _seen(self, axis: Axis, parts: Sequence[Moments]) -> list[Moments]:
        """The evidence, with what the loss says of it where a criterion asks for that."""
        if axis.module not in self.saliency:
            return list(parts)
        return [replace(part, saliency=by) for part, by in zip(parts, self.saliency[axis.module], strict=True)]

    def _refit_(self, axis: Axis, parts: Sequence[Moments], key: tuple[int, str], remember: bool) -> None:
        weight, bias = self.dense.get(axis) or read_consumer(self.model, axis)
        if remember:
            self.dense[axis] = (weight, bias)
        columns = units_to_columns(self.keep[key], axis, weight.device)
        moments = self.mixture.pool(weight, parts)
        refit = REFITS[self.config.refit]
        new_weight, new_bias = refit(weight, bias, moments, columns, float(self.config.damping))
        write_consumer_(self.model, axis, columns, new_weight, new_bias)


def _best(scores: Tensor, width: int) -> tuple[int, ...]:
    """The units with the highest scores, ascending."""
    return tuple(scores.topk(width).indices.sort().values.tolist())
