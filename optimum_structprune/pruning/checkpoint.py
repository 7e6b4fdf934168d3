"""Checkpoints of a pruning inside the layers: a run that was killed goes on at the next layer."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel

from ..arch.modules import layer_list
from ..arch.spec import Widths
from ..method.layers import Source
from ..method.shrink import Masks, fill_layer_
from ..record.plan import Plan
from ..sources.data import CalibrationData
from ..system.resume import Resume


def run_key(data: CalibrationData, model: PreTrainedModel, target: Widths) -> str:
    """The hash that identifies a run: its config, the dense model, the text and the widths that are aimed at."""
    settings = {**data.config.to_dict(), "domains": None}  # the text is compared by its hashes
    return data.key(model, settings, target)


class LayerCheckpoint:
    """The layers of one run that are finished, in a folder."""

    def __init__(self, folder: str, key: str):
        self.resume = Resume(Path(folder), key, f"layer-{key[:12]}")  # those of runs with other targets lie beside it

    def take_over_(self, masks: Masks, source: Source, smaller: PreTrainedModel) -> int:
        """Take over the layers that an earlier run has finished with their kept units, and return their number."""
        saved = self.resume.load()
        if saved is None:
            return 0
        with self.resume.readable():
            masks.keep |= Plan.from_dict(saved.values["plan"]).keep
            reached = dict(saved.values["passes"])
        masks.lost = masks.lost or saved.number > 0
        for layer in range(saved.number):
            with source.at(layer, changes=True):
                fill_layer_(masks.model, masks.arch, layer, self.resume.tensors(layer + 1), smaller)
        source.resume_(saved.local, reached)
        return saved.number

    def save(self, layer: int, masks: Masks, source: Source) -> None:
        """Put a finished layer on disk, with the hidden states that enter the next one."""
        if (state := source.state()) is not None:
            tensors, reached = state
            values = {"plan": Plan(masks.arch.model_type, dict(masks.keep)).to_dict(), "passes": reached}
            self.resume.save(layer + 1, values, layer_list(masks.model, masks.arch)[layer].state_dict(), tensors)
