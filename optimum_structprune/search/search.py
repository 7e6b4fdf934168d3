"""Chooses the final shape of a run by measured losses and short prunings."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from itertools import pairwise, product
from math import inf, isnan
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..arch.spec import ArchSpec, Space, Widths
from ..forward.metrics import evaluating
from ..method.loop import prune_layers_
from ..method.shrink import Masks
from ..pruning.run import Run
from ..sources.data import CalibrationData, source_of
from ..system.processes import broadcast_object
from ..system.stages import progress
from ..widths.allocation import widths_of
from ..widths.budget import Budget, budget_of, removed_parameters
from ..widths.legal import choices, has_one_width, legal_widths
from .trials import LAYER_TOKENS, TRIAL_TOKENS, Curves, Key, LayerTrials, Probe


class Candidate(NamedTuple):
    """A shape that may be taken: what proposed it, its widths, and the sum of the losses of single layers."""

    name: str
    widths: Widths
    predicted: float | None = None


def choose_shape(run: Run) -> Widths:
    """Prunes the likeliest shapes on trial, all layers together, and gives the one of least loss.

    They are those for which the losses of single layers speak, see `LayerTrials`, and the one without measurements. A
    loss is KL(dense‖model) on text set aside.
    """
    with evaluating(run.model), run.report.timed("search"):
        search = Search(run.model, run.arch, run.data)
        trials = search.trials()
        candidates, losses = broadcast_object(search.candidates(trials.curves(trials.losses()))), [0.0]
        if len(candidates) > 1:
            probe = Probe.of(run.model, run.arch, run.data)
            losses = [search.loss(candidate.widths, probe) for candidate in candidates]
    best = losses.index(min(losses))
    for index, (name, widths, predicted) in enumerate(candidates):
        shape = {"proposed_by": name, "widths": widths, "predicted_loss": predicted, "loss": losses[index]}
        run.report.shapes.append({**shape, "chosen": index == best})
    chosen: Widths = candidates[best].widths
    return chosen


class Search:
    """Looks among the shapes of a model that keep to a config; `plain` are the widths of `allocation="uniform"`."""

    def __init__(self, model: PreTrainedModel, arch: ArchSpec, data: CalibrationData):
        self.model, self.arch, self.config, self.data = model, arch, data.config, data
        self.legal = legal_widths(self.config, arch, model.config)
        # What shrinks by default depends on the allocation.
        named = self.config if self.config.widths else replace(self.config, targets=tuple(self.legal))
        self.plain = widths_of(replace(named, allocation="uniform"), arch, model)

    def trials(self) -> LayerTrials:
        """The trials of single layers."""
        masks, probe = Masks(self.model, self.arch), Probe.of(self.model, self.arch, self.data, LAYER_TOKENS)
        return LayerTrials(masks, self.data, probe, self._spaces)

    def candidates(self, curves: Curves) -> list[Candidate]:
        """The shapes to prune on trial: those for which measured losses speak, and the one of `uniform`."""
        config, proposed = self.config, list[Candidate]()
        if config.allocation != "search_uniform":
            proposed += self._layer_by_layer(curves)
        alike_now = has_one_width(self.arch, list(self.plain)) and not config.skip_layers
        if config.allocation != "sensitivity" and config.widths is None and alike_now:
            may = {name: choices(config, self.arch, name, self.legal[name]) for name in self.plain}
            most = 4 if config.allocation == "search_uniform" else 1  # which are pruned on trial
            shapes = uniform_shapes(may, curves, self._is_small(may))
            proposed += [Candidate("one shape", shape, loss) for loss, shape in shapes[:most]]
        distinct: dict[str, Candidate] = {}
        for candidate in (*proposed, Candidate("one width", self.plain)):
            distinct.setdefault(repr(sorted(candidate.widths.items())), candidate)
        return list(distinct.values())

    def _layer_by_layer(self, curves: Curves) -> list[Candidate]:
        """Widths by one ranking of all units, and halfway to one width, as losses add up to more."""
        scores = {key: self._scores(key, curve) for key, curve in curves.items()}
        best = widths_of(self.config, self.arch, self.model, scores)
        highest, beyond = max(float(unit_scores.max()) for unit_scores in scores.values()), {}
        for key, unit_scores in scores.items():
            space, sizes = self._spaces[key][0], torch.arange(len(unit_scores)).flip(0)  # once each unit is gone
            # Units above halfway go first, and steps that end beyond it go in the order of how far they do.
            is_beyond = 2 * sizes < space.width_in(self.plain) + space.width_in(best)
            beyond[key] = (highest + unit_scores) * is_beyond
        shapes = {"each layer": best, "halfway": widths_of(self.config, self.arch, self.model, beyond)}
        return [Candidate(name, widths, predicted_loss(curves, widths)) for name, widths in shapes.items()]

    def _scores(self, key: Key, curve: Sequence[float]) -> Tensor:
        """The loss with each unit, relative to how much less there is of what a budget limits, shape `(width,)`."""
        params = sum(space.unit_params * space.scale for space in self._spaces[key])
        saved = 1.0
        if (budget := self._budget) is not None:
            least = {key[1]: self.legal[key[1]][0]}
            saved = (budget.dense - budget.cost(least)) / max(removed_parameters(self.arch, least), 1)
        return torch.tensor(curve, dtype=torch.float64).diff() / (saved * params)

    @cached_property
    def _spaces(self) -> dict[Key, list[Space]]:
        """The spaces that may shrink, by layer and kind."""
        return {
            (layer, name): spaces
            for name in self.plain
            for layer, spaces in self.arch.by_layer(name).items()
            if layer not in self.config.skip_layers
        }

    @cached_property
    def _budget(self) -> Budget | None:
        """The budget of the config, if it has one."""
        return None if self.config.budget is None else budget_of(self.config, self.arch, self.model, list(self.plain))

    def _is_small(self, may: Mapping[str, Sequence[int]]) -> Callable[[Widths], bool]:
        """Tests whether a shape keeps to the budget, or gives up the share to within half of the smallest step."""
        if (budget := self._budget) is not None:
            return lambda widths: budget.cost(widths) <= budget.limit
        finest = max(may, key=lambda name: len(may[name]))
        sizes = [removed_parameters(self.arch, {finest: width}) for width in may[finest]]
        step = min((more - less for more, less in pairwise(sizes)), default=0)
        need = (self.config.sparsity or 0.0) * sum(self.arch.layer_params) - step / 2
        return lambda widths: removed_parameters(self.arch, widths) >= need

    def loss(self, widths: Widths, probe: Probe) -> float:
        """Measures the loss of a shape after a pruning on some samples, which is undone; NaN is infinite."""
        data, masks = self.data.portion(TRIAL_TOKENS), Masks(self.model, self.arch)
        source = source_of(self.model, self.arch, data.own_batches, data.config.feedback_share)
        layers = progress(range(self.arch.num_layers), desc="trial", unit="layer")
        try:
            prune_layers_(masks, source, data.method(self.model, self.arch), widths, layers=layers)
            total = float(data.mean(probe.losses(self.model)))
        finally:
            masks.undo_(partial(source.at, changes=True))
        return inf if isnan(total) else total


def evenly_spaced(widths: Sequence[int]) -> list[int]:
    """At most 16 of several widths, evenly, with the first and the last."""
    last = len(widths) - 1
    return [*widths] if last < 16 else [widths[round(n * last / 15)] for n in range(16)]


def uniform_shapes(
    choices: Mapping[str, Sequence[int]], curves: Curves, is_small: Callable[[Widths], bool]
) -> list[tuple[float, Widths]]:
    """The shapes with one width for all layers, each with its predicted loss, the best first.

    For each choice of the coarser spaces, the space with the most widths takes the widest that is small enough.
    """
    finest = max(choices, key=lambda name: len(choices[name]))
    others = [name for name in choices if name != finest]
    widest_first = sorted(choices[finest], reverse=True)
    shapes: list[tuple[float, Widths]] = []
    for widths_of_others in product(*(evenly_spaced(choices[name]) for name in others)):
        coarse = dict(zip(others, widths_of_others, strict=True))
        with_finest = [{**coarse, finest: width} for width in widest_first]
        index = bisect_left(with_finest, True, key=is_small)
        shapes += [(predicted_loss(curves, widths), widths) for widths in with_finest[index : index + 1]]
    return sorted(shapes, key=lambda pair: pair[0])


def predicted_loss(curves: Curves, widths: Widths) -> float:
    """The total of the measured losses of what goes in each layer and kind of space."""
    total = 0.0
    for (layer, name), curve in curves.items():
        width = widths[name]
        stays = width if isinstance(width, int) else width.get(layer, len(curve) - 1)
        total += curve[max(len(curve) - 1 - stays, 0)]
    return total
