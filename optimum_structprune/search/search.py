"""The final shape of a run: as its config says, by scores of all units, or by measured losses, which propose a few
shapes that short prunings on trial decide between.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from math import inf, isnan

from transformers import PreTrainedModel

from ..arch.spec import ArchSpec, Widths
from ..config.pruning import ALLOCATIONS
from ..errors import StructPruneError
from ..forward.metrics import evaluating
from ..pruning.run import Run
from ..sources.data import CalibrationData
from ..system.processes import broadcast_object
from ..widths.allocation import candidate_widths, choices, has_one_width, legal_widths, spaces_by_layer
from ..widths.budget import widths_of, within_budget
from ..widths.shapes import Curves, Key, Resource, predicted_loss, resources, searched_widths, uniform_shapes
from . import ranking as ranking  # registers `global`
from .masked import MaskedPruning
from .trials import LAYER_TOKENS, TRIAL_TOKENS, Probe, Trials


# So many uniform shapes are pruned on trial.
FINALISTS = 4
# The name under which a run remembers the losses of its trials.
MEASURED_LOSSES = "measured losses"


@dataclass(frozen=True)
class Candidate:
    """Widths that may be taken, what has proposed them, and the loss that those of single layers add up to."""

    name: str
    widths: Widths
    predicted: float | None = None


def choose_shape(run: Run, widths: Widths) -> Widths:
    """The shape that a run brings its model to where its config gives no widths by layer: of the same total, from
    scores of all units or from measured losses.
    """
    if run.config.searches:
        return searched_shape(run)
    rank = ALLOCATIONS.get(run.config.allocation)
    with evaluating(run.model), run.report.timed("ranking"):
        scores = rank(run.model, run.arch, run.data, list(widths))
    return widths_of(run.config, run.arch, run.model, scores)


def searched_shape(run: Run) -> Widths:
    """The shape that loses least of those that remove as much as a config says.

    Every layer in turn gives up three quarters of each space, with the refit of the config, while all others are
    dense; with a quarter gone, the loss is less by as much as the error of the layer's outputs. The loss is
    KL(dense‖model) on held-out text. The shapes of least total loss and the one without measured losses are then
    pruned on trial, all layers together, and the best is taken.
    """
    report = run.report
    with evaluating(run.model), report.timed("search"):
        search = Search(run.model, run.arch, run.data)
        trials = search.trials()
        losses = run.data.cache.get(MEASURED_LOSSES) or trials.losses()
        candidates = broadcast_object(search.candidates(trials.curves(losses)))
        tried = search.tried(candidates, Probe.of(run.model, run.arch, run.data))
    best = min(tried, key=lambda pair: pair[0])[1]
    report.shapes = [
        {
            "proposed_by": candidate.name,
            "widths": candidate.widths,
            "predicted_loss": candidate.predicted,
            "loss": loss,
            "chosen": candidate is best,
        }
        for loss, candidate in tried
    ]
    return best.widths


class Search:
    """The shapes of one model that keep to one config; `plain` are the widths of `allocation="uniform"`."""

    def __init__(self, model: PreTrainedModel, arch: ArchSpec, data: CalibrationData):
        self.model, self.arch, self.config, self.data = model, arch, data.config, data
        self.legal = legal_widths(self.config, arch, model.config)
        # What shrinks by default depends on the allocation.
        named = self.config if self.config.widths else replace(self.config, targets=tuple(self.legal))
        uniform = replace(named, allocation="uniform", objective="mean", losses_dir=None)
        self.plain = widths_of(uniform, arch, model)

    def trials(self) -> Trials:
        """The trials that the choice takes."""
        # A trial has no errors of earlier layers that error feedback could see, and a bias would stay in the model.
        refit = "none" if self.config.refit == "bias" else self.config.refit
        spaces = {
            (layer, name): of_kind
            for name in self.plain
            for layer, of_kind in spaces_by_layer(self.arch, name).items()
            if layer not in self.config.skip_layers
        }
        return Trials(
            MaskedPruning(self.model, self.arch, self.config, refit),
            self.data,
            Probe.of(self.model, self.arch, self.data, LAYER_TOKENS),
            spaces,
        )

    def candidates(self, curves: Curves) -> list[Candidate]:
        """The shapes that are pruned on trial: those that measured losses speak for, and the one of `uniform`."""
        config, plain = self.config, Candidate("one width", self.plain)
        needed = resources(config, self.arch, self.model, list(self.plain))
        proposed = []
        if config.allocation != "search_uniform":
            proposed += self._layer_by_layer(curves, needed)
        alike_now = has_one_width(self.arch, list(self.plain)) and not config.skip_layers
        if config.allocation != "sensitivity" and config.widths is None and alike_now:
            proposed += self._uniform(curves, needed[0])
        # A budget of cache is predicted from means over the layers, which differ where a layer keeps more than others.
        kept = [candidate for candidate in proposed if within_budget(config, self.arch, self.model, candidate.widths)]
        distinct: dict[str, Candidate] = {}
        for candidate in (*kept, plain):
            distinct.setdefault(repr(sorted(candidate.widths.items())), candidate)
        return list(distinct.values())

    def _layer_by_layer(self, curves: Curves, needed: Sequence[Resource]) -> list[Candidate]:
        """The best widths for each layer, and those halfway to one width, since layers that each give up much lose
        more together than they do one at a time.
        """
        spaces = {(space.layer, name): space for name in self.plain for space in self.arch.of(name)}
        widths = {
            key: candidate_widths(self.config, self.arch, space, self.legal[key[1]])
            for key, space in spaces.items()
            if key[0] not in self.config.skip_layers
        }
        needed = [self._to_the_nearest(resource, _least_step(resource, widths)) for resource in needed]
        best = searched_widths(widths, curves, needed)
        proposed = [Candidate("each layer", best, predicted_loss(curves, best))]
        between = {}
        for key, of_key in widths.items():
            plain, searched = spaces[key].width_in(self.plain), spaces[key].width_in(best)
            ends = sorted((2 * plain, searched + plain))
            # Where one width is no multiple of `round_to`, none may lie between it and a width that is next to it.
            between[key] = [width for width in of_key if ends[0] <= 2 * width <= ends[1]] or [searched]
        with suppress(StructPruneError):  # the widths in between may be too few to save enough
            halfway = searched_widths(between, curves, needed)
            proposed.append(Candidate("halfway", halfway, predicted_loss(curves, halfway)))
        return proposed

    def _uniform(self, curves: Curves, needed: Resource) -> list[Candidate]:
        """The best few shapes of one width."""
        may = {name: choices(self.config, self.arch, name, self.legal[name]) for name in self.plain}
        finest = max(may, key=lambda name: len(may[name]))
        step = min((high - low for low, high in pairwise(may[finest])), default=0)
        needed = self._to_the_nearest(needed, step * sum(needed.unit[key] for key in curves if key[1] == finest))
        most = FINALISTS if self.config.allocation == "search_uniform" else 1
        return [Candidate("one shape", shape, loss) for loss, shape in uniform_shapes(may, curves, needed)[:most]]

    def _to_the_nearest(self, resource: Resource, step: float) -> Resource:
        """What is needed, to within half of a step, where it is a share or a mean and not a budget that is kept."""
        return resource if self.config.budget is not None else replace(resource, need=resource.need - step / 2)

    def tried(self, candidates: Sequence[Candidate], probe: Probe) -> list[tuple[float, Candidate]]:
        """The loss of the model in each shape, after a pruning on a part of the samples."""
        if len(candidates) == 1:
            return [(0.0, candidates[0])]
        return [(self.loss(candidate.widths, probe), candidate) for candidate in candidates]

    def loss(self, widths: Widths, probe: Probe) -> float:
        """The loss of the model in one shape, after a pruning on a part of the samples; infinite where it is NaN. The
        model is only masked, and comes back as it was.
        """
        data = self.data.portion(TRIAL_TOKENS)
        pruning = MaskedPruning(self.model, self.arch, self.config)
        try:
            pruning.run_(data.source(self.model, self.arch, data.config.feedback), pruning.method(data), widths)
            total = data.total_loss(probe.losses(self.model))
        finally:
            pruning.consumers.undo_()
        return inf if isnan(total) else total


def _least_step(resource: Resource, widths: Mapping[Key, Sequence[int]]) -> float:
    """How much goes with the cheapest step from one width to the next."""
    steps = [
        resource.unit[key] * (high - low)
        for key, of_key in widths.items()
        for high, low in pairwise(of_key)
        if key in resource.unit
    ]
    return min(steps, default=0.0)
