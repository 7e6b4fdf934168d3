"""Pruning by masks, which can be taken back: in rounds, of which all but the last only mask units, so that every round
fits the dense weights anew; and on trial.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..arch.meta import shrunk_skeleton
from ..arch.modules import adopt_config_
from ..arch.spec import ArchSpec, Axis, Space, Widths
from ..config.pruning import StructPruneConfig
from ..method.calibrate import Moments, mixed
from ..method.loop import Method, choose_units, refit_consumers, score_units
from ..method.shrink import Values, read_consumer, shrink_layer_, units_to_columns, write_consumer_
from ..pruning.run import Run, Step
from ..record.plan import Plan
from ..sources.data import CalibrationData, Source
from ..sources.offloaded import layer_in_memory
from ..system.stages import progress
from ..widths.budget import biased_spaces
from ..widths.schedule import round_widths


class Consumers:
    """The consumers of a model that is being pruned, with the dense values of those that have been changed.

    A removed unit is masked: its columns are zero. The dense values are remembered in the model's own dtype, so every
    change can be undone exactly until `forget` is called. What is read or changed has to be in memory.
    """

    def __init__(self, model: PreTrainedModel, arch: ArchSpec):
        self.model, self.arch = model, arch
        self._dense: dict[Axis, Values] = {}

    def dense(self, axis: Axis) -> Values:
        """The values before any change, as fp32 copies."""
        if axis not in self._dense:
            return read_consumer(self.model, axis)
        weight, bias = self._dense[axis]
        return weight.to(torch.float32, copy=True), None if bias is None else bias.to(torch.float32, copy=True)

    def mask_(self, axis: Axis, columns: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        """Give the kept columns new values and mask all others; see `write_consumer_`."""
        if axis not in self._dense:
            self._dense[axis] = read_consumer(self.model, axis, dtype=None)
        write_consumer_(self.model, axis, columns, weight, bias)

    def copies(self, axes: Iterable[Axis]) -> dict[Axis, Values]:
        """Copies of the present values of some consumers, in the model's dtype."""
        return {axis: read_consumer(self.model, axis, dtype=None) for axis in axes}

    @contextmanager
    def holding(self, values: Mapping[Axis, Values]) -> Iterator[None]:
        """Consumers that have other values inside `with`."""
        present = self.copies(values)
        self._put_(values)
        try:
            yield
        finally:
            self._put_(present)

    def as_dense(self, axes: Iterable[Axis]) -> AbstractContextManager[None]:
        """Consumers that have their dense values inside `with`."""
        return self.holding({axis: self._dense[axis] for axis in axes if axis in self._dense})

    def undo_(self) -> None:
        """Make every consumer dense again, wherever its layer is."""
        for layer in range(self.arch.num_layers):
            prefix = self.arch.layer_prefix(layer)
            values = {axis: dense for axis, dense in self._dense.items() if axis.param.startswith(prefix)}
            if values:
                with layer_in_memory(self.model, self.arch, layer, changes=True):
                    self._put_(values)
        self._dense = {}

    def forget(self, axes: Iterable[Axis]) -> None:
        """Drop the dense values of consumers whose removed columns have left the model."""
        for axis in axes:
            self._dense.pop(axis, None)

    @torch.no_grad()
    def _put_(self, values: Mapping[Axis, Values]) -> None:
        for axis, (weight, bias) in values.items():
            every = torch.arange(weight.shape[1], device=weight.device)
            write_consumer_(self.model, axis, every, weight, bias)
            module = self.model.get_submodule(axis.module)
            if bias is None and axis.part is None and getattr(module, "bias", None) is not None:
                module.bias = None  # type: ignore[assignment]  # a refit added it


class MaskedPruning:
    """Prunes the units inside the layers of a model by masks, in one pass over the layers or in several.

    Every refit starts from the dense weights and aims at the dense layer's output on the present residual stream: no
    error of an earlier pass is fitted again. Scores, in contrast, are those of the refitted weights, in which a kept
    unit already makes up for units removed before.
    """

    def __init__(self, model: PreTrainedModel, arch: ArchSpec, config: StructPruneConfig, refit: str | None = None):
        self.model, self.arch, self.config = model, arch, config
        self.refit = refit or config.refit
        self.keep: dict[tuple[int, str], tuple[int, ...]] = {}  # the units so far, by layer and name of the space
        self.consumers = Consumers(model, arch)
        self.shrunk = False  # whether a layer has lost its removed units for good

    @property
    def plan(self) -> Plan:
        """The kept units, as a value."""
        return Plan(self.arch.model_type, dict(self.keep))

    def method(self, data: CalibrationData) -> Method:
        """How units are scored and refitted, by this data."""
        return data.method(self.model, self.arch, self.refit)

    def run_(
        self,
        source: Source,
        method: Method,
        widths: Widths,
        smaller: PreTrainedModel | None = None,
        desc: str = "trial",
        **bar: Any,
    ) -> None:
        """Bring all layers to their widths, one after the other: by masks, or with the `smaller` model without weights
        to the size that each layer has there, as soon as it is finished.
        """
        for layer in progress(range(self.arch.num_layers), desc=desc, unit="layer", **bar):
            with source.at(layer, changes=True):
                self._prune_layer_(layer, source, method, widths, smaller)

    def _prune_layer_(
        self, layer: int, source: Source, method: Method, widths: Widths, smaller: PreTrainedModel | None
    ) -> None:
        """Bring one layer to its widths, and the samples behind it."""
        axes = [axis for space in self.arch.at(layer) for axis in space.consumers]
        with self.consumers.as_dense(axes):
            source.advance_dense(layer, widths.keys())
        for space in self.arch.at(layer):
            width = space.width_in(widths) * space.scale
            if width < space.size:
                moments = self.gather(source, method, space)
                scores = self.score(method, space, moments)
                self.choose_(method, space, moments, scores, width)
                self.refit_(method, space, moments)
                del moments  # before those of the next space: a Gram matrix takes gigabytes
        if smaller is not None:
            self.shrunk = True
            with source.same_outputs(layer):
                shrink_layer_(self.model, self.arch, layer, self.keep, smaller)
            self.consumers.forget(axes)
        source.advance(layer)

    def gather(self, source: Source, method: Method, space: Space) -> list[Moments]:
        """The moments of the domain mixture at each consumer of a space."""
        weights = [self.consumers.dense(axis)[0] for axis in space.consumers]
        criterion = method.criterion(space.layer)
        # A refit starts from the dense weights, so error feedback has to see the error that these leave.
        with self.consumers.as_dense(space.consumers):
            mixtures = mixed(source.moments(space.layer, space, method.gram), method.shares, weights)
            for axis, mixture in zip(space.consumers, mixtures, strict=True):
                mixture.prior = method.prior(criterion, self.model, self.arch, space, axis)
        return mixtures

    def score(self, method: Method, space: Space, moments: Sequence[Moments]) -> Tensor:
        """The scores of the units that are left, by the present weights, shape `(units,)`."""
        weights, selected = [], []
        for axis, of_consumer in zip(space.consumers, moments, strict=True):
            weight = read_consumer(self.model, axis)[0]
            if space.key in self.keep:
                columns = units_to_columns(self.keep[space.key], axis, weight.device)
                weight, of_consumer = weight[:, columns], of_consumer.select(columns)
            weights.append(weight)
            selected.append(of_consumer)
        return score_units(method.criterion(space.layer), space, weights, selected, method.name)

    def choose_(self, method: Method, space: Space, moments: Sequence[Moments], scores: Tensor, width: int) -> None:
        """Keep the units with the highest scores, or those that the criterion takes in their place."""
        dense = [self.consumers.dense(axis) for axis in space.consumers]
        present, criterion = self.keep.get(space.key, range(space.size)), method.criterion(space.layer)
        self.keep[space.key] = choose_units(criterion, space, scores, width, present, dense, moments)

    def refit_(self, method: Method, space: Space, moments: Sequence[Moments]) -> None:
        """Give each consumer of a space its refitted columns and mask the others."""
        keep, dense = self.keep[space.key], [self.consumers.dense(axis) for axis in space.consumers]
        refitted = refit_consumers(method.criterion(space.layer), space, keep, dense, moments, method)
        for axis, columns in zip(space.consumers, refitted, strict=True):
            self.consumers.mask_(axis, *columns)

    def trial(
        self, method: Method, space: Space, moments: Sequence[Moments], scores: Tensor, width: int
    ) -> dict[Axis, Values]:
        """The values of the consumers of one space if it kept `width` units; the model is left as it is."""
        keep = dict(self.keep)
        with self.consumers.holding(self.consumers.copies(space.consumers)):
            self.choose_(method, space, moments, scores, width)
            self.refit_(method, space, moments)
            values = self.consumers.copies(space.consumers)
        self.keep = keep
        self.consumers.forget(space.consumers)
        return values

    def undo_(self) -> None:
        """Make the model dense again, unless units have been removed for good."""
        if not self.shrunk:
            self.consumers.undo_()


def prune_in_rounds_(run: Run, step: Step) -> Plan:
    """Bring all layers to the widths of a step in several rounds: the last removes all that is masked, each layer as
    soon as it is finished.
    """
    rounds, layers = round_widths(run.config, run.arch, step.widths), run.arch.num_layers
    smaller = shrunk_skeleton(run.model, run.arch, step.widths, biased_spaces(run.config, run.arch, step.widths))
    pruning = MaskedPruning(run.model, run.arch, run.config)
    try:
        for done, widths in enumerate(rounds):
            is_last = done + 1 == len(rounds)
            with run.report.timed(f"round {done + 1}"):
                method, source = pruning.method(run.data), run.data.source(run.model, run.arch, run.config.feedback)
                # The bar counts the layers of all rounds, for the time that is left.
                bar: dict[str, Any] = {"initial": done * layers, "total": len(rounds) * layers}
                bar["desc"] = f"round {done + 1}/{len(rounds)}"
                pruning.run_(source, method, widths, smaller if is_last else None, **bar)
            if run.config.reweights:
                weigh_domains_(run, widths, is_last)
    except BaseException:  # Ctrl-C too
        pruning.undo_()
        raise
    finally:
        run.changed = run.changed or pruning.shrunk
    adopt_config_(run.model, smaller)
    return pruning.plan


def weigh_domains_(run: Run, widths: Widths, is_last: bool) -> None:
    """Enter a round into the report, and weigh the domains anew for the next one by what they have lost."""
    ratios: dict[str, float] = {}
    if run.measure is not None and not is_last:
        with run.report.timed("perplexity"):
            ratios = run.measure.ratios(run.model, run.arch)
    shares = {domain.name: share for domain, share in zip(run.data.domains, run.data.shares, strict=True)}
    run.report.rounds.append({"widths": dict(widths), "shares": shares, "perplexity_ratio": ratios})
    if ratios:
        run.data = run.data.reweighted(ratios)
