"""One round: block by block, gather, score, choose, refit, shrink."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers.utils.logging import tqdm

from .arch.spec import ArchSpec, Axis, Space, Widths
from .calibration.evidence import judge, judge_experts, pool
from .calibration.passes import Passes
from .calibration.stats import Moments
from .criteria import CRITERIA, Criterion
from .plan import Plan
from .ranking import standardised
from .refit import NEEDS_GRAM, REFITS
from .surgery import read_consumer, shrink_block_, units_to_columns, write_consumer_


if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .config import StructPruneConfig


@dataclass
class Sweep:
    """Prunes a model in place, one round after the other.

    Between rounds, removed units are only masked (their columns in the consumers are zero), and the dense consumers
    are remembered. So every refit starts from the dense weights and aims at the dense block's output on the present
    stream: no error of an earlier round is fitted again. Scores, in contrast, judge the refitted weights, in which a
    kept unit already carries the load of those removed before.

    Attributes:
        model: The model that is changed.
        spec: Its description.
        config: How to prune.
        shares: Weight of each domain.
        keep: What is kept so far.
        dense: Dense weight and bias of the consumers that earlier rounds have changed.
    """

    model: PreTrainedModel
    spec: ArchSpec
    config: StructPruneConfig
    shares: Sequence[float]
    keep: dict[tuple[int, str], tuple[int, ...]] = field(default_factory=dict)
    dense: dict[Axis, tuple[Tensor, Tensor | None]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.criterion: Criterion = CRITERIA.get(self.config.criterion)(self.config)
        self.gram = self.criterion.needs_gram or self.config.refit in NEEDS_GRAM

    def run_(self, passes: Passes, widths: Widths, smaller: PreTrainedModel | None, title: str) -> None:
        """One round.

        Args:
            passes: The calibration data.
            widths: Number of units to keep, by space, in every block or by block.
            smaller: In the last round, the `skeleton` of the shrunk model, into which the blocks move.
            title: Label of the progress bar.
        """
        for layer in tqdm(range(self.spec.num_blocks), desc=title, unit="block"):
            for space in self.spec.at(layer):
                width = space.width_in(widths) * space.scale
                if width < space.size:
                    self._prune_(space, passes.gather(layer, space, self.gram), width, smaller is None)
            if smaller is not None:
                shrink_block_(self.model, self.spec, layer, self.plan, smaller)
            passes.advance(layer)

    def scores(self, passes: Passes, names: Collection[str]) -> dict[tuple[int, str], Tensor]:
        """Scores of the units of the dense model that compare over blocks and spaces; nothing is changed.

        Args:
            passes: The calibration data.
            names: Kinds of space.
        """
        found = {}
        for layer in tqdm(range(self.spec.num_blocks), desc="ranking", unit="block"):
            for space in self.spec.at(layer):
                if space.kind in names:
                    evidence = passes.gather(layer, space, self.criterion.needs_gram)
                    parts = [self._standardised(*pair) for pair in zip(space.into, evidence, strict=True)]
                    found[layer, space.name] = torch.stack(parts).mean(0)
            passes.advance(layer)
        return found

    def remove_experts_(self, passes: Passes, widths: Widths, smaller: PreTrainedModel) -> None:
        """Take whole experts out of every block.

        Nothing short of that silences an expert, since a router is a softmax over logits: there is no weight that
        makes one minus infinity. So this is done once, before the rounds, and the blocks move at once.

        Args:
            passes: The calibration data.
            widths: Number of experts to keep, by space.
            smaller: The `skeleton` of the model without them.
        """
        for layer in tqdm(range(self.spec.num_blocks), desc="experts", unit="block"):
            for space in self.spec.at(layer):
                if space.kind in widths:
                    found = passes.contributions(layer, space)
                    scores = judge_experts(found, self.shares, self.config.aggregation)
                    self.keep[layer, space.name] = _best(scores, space.width_in(widths))
            shrink_block_(self.model, self.spec, layer, self.plan, smaller)
            passes.advance(layer)

    @property
    def plan(self) -> Plan:
        """What is kept, as a value."""
        return Plan(self.spec.model_type, dict(self.keep))

    def _prune_(self, space: Space, evidence: Sequence[Sequence[Moments]], width: int, remember: bool) -> None:
        key = (space.layer, space.name)
        before = self.keep.get(key, tuple(range(space.size)))
        scores = [self._score(axis, parts, before) for axis, parts in zip(space.into, evidence, strict=True)]
        self.keep[key] = tuple(before[i] for i in _best(torch.stack(scores).sum(0), width))
        for axis, parts in zip(space.into, evidence, strict=True):
            self._refit_(axis, parts, self.keep[key], remember)

    def _score(self, axis: Axis, parts: Sequence[Moments], units: Sequence[int]) -> Tensor:
        weight, _ = read_consumer(self.model, axis)
        columns = units_to_columns(units, axis, weight.device)
        parts = [part.select(columns) for part in parts]
        config = self.config
        return judge(self.criterion, weight[:, columns], parts, self.shares, axis.block, config.aggregation)

    def _standardised(self, axis: Axis, parts: Sequence[Moments]) -> Tensor:
        weight, _ = read_consumer(self.model, axis)
        columns = judge(self.criterion, weight, parts, self.shares, 1, self.config.aggregation)
        return standardised(columns, axis.block).cpu()

    def _refit_(self, axis: Axis, parts: Sequence[Moments], units: Sequence[int], remember: bool) -> None:
        weight, bias = self.dense.get(axis) or read_consumer(self.model, axis)
        if remember:
            self.dense[axis] = (weight, bias)
        columns = units_to_columns(units, axis, weight.device)
        moments = pool(weight, parts, self.shares)
        refitted = REFITS[self.config.refit](weight, bias, moments, columns, float(self.config.damping))
        write_consumer_(self.model, axis, columns, *refitted)


def _best(scores: Tensor, width: int) -> tuple[int, ...]:
    """The units with the highest scores, ascending."""
    return tuple(scores.topk(width).indices.sort().values.tolist())
