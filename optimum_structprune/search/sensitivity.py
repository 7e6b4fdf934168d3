"""The allocation `sensitivity`: choose a width for each layer by measured losses and short prunings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..arch.inference import evaluating
from ..arch.spec import VOCAB, ArchSpec, Space, Widths
from ..config.pruning import StructPruneConfig
from ..method.shrink import Masks
from ..pruning.request import PruningRequest
from ..steps.base import RunState
from ..steps.data import CalibrationData
from ..system.processes import broadcast_object
from ..widths.allocation import widths_of
from ..widths.budget import budget_of, removed_parameters
from ..widths.legal import legal_widths
from .layer_trials import LAYER_TOKENS, SHAPE_TOKENS, Curves, Key, LayerTrials
from .probe import Probe
from .trials import Candidate, Divergence, Trials, record_shapes


def final_widths(request: PruningRequest, state: RunState) -> Widths:
    """Return the final widths of all spaces except the tokens, after tokens have been removed."""
    if request.tokens is None:
        widths = request.widths if state.chosen is None else state.chosen
        if state.config.allocation == "uniform" or not widths:
            return widths
        return choose_shape(state, state.config)
    if state.chosen is not None and state.config.allocation == "uniform":
        return {name: width for name, width in state.chosen.items() if name != VOCAB}

    from ..steps.vocabulary import config_of_the_rest  # most runs remove no tokens

    config = config_of_the_rest(request.tokens, state)
    if config is None:
        return {}
    if config.allocation == "uniform":
        return widths_of(config, state.arch, state.model)
    return choose_shape(state, config)


def choose_shape(state: RunState, config: StructPruneConfig) -> Widths:
    """Return the candidate with the smallest loss, and record all candidates in the report.

    A short trial prunes all layers to each candidate. The loss is KL(original‖pruned) on the probe, which is text that
    is neither calibrated on nor held out.
    """
    with evaluating(state.model), state.report.timed("search"):
        search = Search(state.model, state.arch, state.data, config)
        trials = search.trials()
        curves = trials.curves(trials.losses())
        candidates = broadcast_object(search.candidates(curves))

        losses = [0.0]
        if len(candidates) > 1:
            shape_trials = Trials(state, Divergence(state), SHAPE_TOKENS)
            losses = [shape_trials.loss(candidate.widths) for candidate in candidates]

    return record_shapes(state.report, candidates, losses).widths


class Search:
    """A search for the shape with the smallest loss among shapes that meet a config.

    Attributes:
        plain: The widths of `allocation="uniform"`.
        spaces: The spaces that may shrink, by layer and kind.
    """

    def __init__(self, model: PreTrainedModel, arch: ArchSpec, data: CalibrationData, config: StructPruneConfig):
        self.model = model
        self.arch = arch
        self.data = data
        self.config = config
        self.legal = legal_widths(config, arch, model.config)

        uniform_config = replace(config, allocation="uniform")
        if not config.widths:
            # The default targets depend on the allocation.
            uniform_config = replace(uniform_config, targets=tuple(self.legal))
        self.plain = widths_of(uniform_config, arch, model)

        self.spaces: dict[Key, list[Space]] = {}
        for name in self.plain:
            for layer, spaces in arch.by_layer(name).items():
                if layer not in config.skip_layers:
                    self.spaces[layer, name] = spaces

    def trials(self) -> LayerTrials:
        """Return the trials of single layers."""
        masks = Masks(self.model, self.arch)
        probe = Probe.of(self.model, self.arch, self.data, LAYER_TOKENS)
        return LayerTrials(masks, self.data, probe, self.spaces)

    def candidates(self, curves: Curves) -> list[Candidate]:
        """Return different shapes: one ranking of all units by loss, halfway to one width, and one width."""
        scores = {key: self._unit_scores(key, curve) for key, curve in curves.items()}
        by_layer = widths_of(self.config, self.arch, self.model, scores)
        halfway = widths_of(self.config, self.arch, self.model, self._halfway_scores(scores, by_layer))

        proposed = [
            Candidate("each layer", by_layer, predicted_loss(curves, by_layer)),
            Candidate("halfway", halfway, predicted_loss(curves, halfway)),
            Candidate("one width", self.plain),
        ]

        different: dict[str, Candidate] = {}
        for candidate in proposed:
            different.setdefault(repr(sorted(candidate.widths.items())), candidate)
        return list(different.values())

    def _unit_scores(self, key: Key, curve: Sequence[float]) -> Tensor:
        """Return the loss by each removed unit, shape `(width,)`, per parameter or per unit of the budget."""
        params = sum(space.unit_params * space.scale for space in self.spaces[key])

        saved_per_parameter = 1.0
        if self.config.budget is not None:
            budget = budget_of(self.config, self.arch, self.model, list(self.plain))
            _, name = key
            narrowest = {name: self.legal[name][0]}
            saved = budget.original - budget.cost(narrowest)
            saved_per_parameter = saved / max(removed_parameters(self.arch, narrowest), 1)

        return torch.tensor(curve, dtype=torch.float64).diff() / (saved_per_parameter * params)

    def _halfway_scores(self, scores: dict[Key, Tensor], by_layer: Widths) -> dict[Key, Tensor]:
        """Return scores that remove the units above the middle of two shapes first.

        The losses of single layers do not add up for large cuts, so the best ranking may differ too much from one
        width.
        """
        highest = max(float(unit_scores.max()) for unit_scores in scores.values())
        halfway: dict[Key, Tensor] = {}
        for key, unit_scores in scores.items():
            space = self.spaces[key][0]

            # The width once each unit is removed.
            widths = torch.arange(len(unit_scores)).flip(0)
            # Steps that end below the middle follow in the order of their scores.
            is_below = 2 * widths < space.width_in(self.plain) + space.width_in(by_layer)
            halfway[key] = (highest + unit_scores) * is_below

        return halfway


def predicted_loss(curves: Curves, widths: Widths) -> float:
    """Return the sum of the measured losses of the removed units over layers and kinds of space."""
    total = 0.0

    for (layer, name), curve in curves.items():
        original_width = len(curve) - 1
        width = widths[name]
        if not isinstance(width, int):
            width = width.get(layer, original_width)

        total += curve[max(original_width - width, 0)]
    return total
