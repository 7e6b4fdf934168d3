"""One pass over the layers of a model: gather, score, choose, refit, and in the end shrink."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils.logging import tqdm

from ..arch.load import layer_list
from ..arch.spec import Space, Widths
from ..calibration.passes import Passes
from ..criteria.mixture import Mixture, Pool, Scoring, pooled, standardised
from ..surgery.cut import fill_layer_, shrink_layer_
from .units import Units


if TYPE_CHECKING:
    from .progress import Progress


class Sweep(Units):
    """Prunes the units inside the layers of a model, one round after the other.

    Between rounds, removed units are only masked. Every refit starts from the dense weights and aims at the dense
    layer's output on the present residual stream, so no error of an earlier round is fitted again. Scores, in
    contrast, are those of the refitted weights, in which a kept unit already makes up for units removed before.
    """

    def run_(
        self,
        passes: Passes,
        mixture: Mixture,
        widths: Widths,
        smaller: PreTrainedModel | None,
        title: str,
        progress: Progress | None = None,
        number: int = 1,
        rounds: int = 1,
    ) -> None:
        """One round."""
        every = range(self.arch.num_layers)
        done = 0 if progress is None or smaller is None else self._go_on_(progress, passes, smaller)
        before = (number - 1) * len(every)
        for layer in tqdm(
            every[done:], desc=title, unit="layer", initial=before + done, total=max(rounds, number) * len(every)
        ):
            with self.placement.at(layer, changes=True):
                self._prune_layer_(layer, passes, mixture, widths, smaller)
                passes.advance(layer)
                if progress is not None and smaller is not None and (state := passes.state()) is not None:
                    tensors = layer_list(self.model, self.arch)[layer].state_dict()
                    progress.save(layer, self.plan, tensors, state, self.choices)

    def scores(self, passes: Passes, mixture: Mixture, names: Collection[str]) -> dict[tuple[int, str], Tensor]:
        """Scores of the units of the dense model that compare over layers and spaces; nothing is changed.

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

    def _go_on_(self, progress: Progress, passes: Passes, smaller: PreTrainedModel) -> int:
        """Take over the layers that an earlier run has finished, and return their number."""
        finished = progress.load()
        if finished is None:
            return 0
        for layer in range(finished.layers):
            with self.placement.at(layer, changes=True):
                self.shrunk = True
                fill_layer_(self.model, self.arch, layer, progress.tensors(layer), smaller)
        self.keep, self.choices = dict(finished.plan.keep), dict(finished.choices)
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
                self._choose_(space, self.gather(passes, space, mixture), width, note=True)
        if smaller is not None:
            self.shrunk = True
            shrink_layer_(self.model, self.arch, layer, self.plan, smaller)
            self.consumers.forget(axes)

    def _comparable(self, space: Space, passes: Passes, mixture: Mixture) -> Tensor:
        """Scores of the units of a space that compare over layers, shape `(units,)`."""
        criterion = self._criterion(space.layer)
        weights = [self.consumers.present(axis)[0] for axis in space.into]
        norms = self._producer_norms(criterion, space)
        pools = [Pool(mixture, weight, Scoring(criterion, weight, 1, producer_norms=norms)) for weight in weights]
        found = pooled(passes.gather(space.layer, space, criterion.needs_gram), pools)
        by_consumer = [
            standardised(of_one.scores, axis.per_unit).cpu() for axis, of_one in zip(space.into, found, strict=True)
        ]
        return torch.stack(by_consumer).mean(0)
