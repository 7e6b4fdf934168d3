"""Save checkpoints of a pruning inside the layers, so that an interrupted run resumes at the next layer."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel

from ..arch.modules import layer_list
from ..arch.spec import Widths
from ..method.layers import Source
from ..method.plan import Plan
from ..method.shrink import Masks, fill_layer_
from ..system.resume import Resume
from .data import CalibrationData


def run_key(data: CalibrationData, model: PreTrainedModel, widths: Widths) -> str:
    """Return the hash that identifies a run: its config, the original model, the text and the final widths."""
    # The domains are left out, because `data.key` hashes their text.
    settings = data.config.to_dict()
    settings["domains"] = None
    return data.key(model, settings, widths)


class LayerCheckpoint:
    """The finished layers of one run, in a folder.

    Args:
        folder: The folder. It may contain checkpoints of runs with other widths.
        key: The hash that identifies the run; see `run_key`.
    """

    def __init__(self, folder: str, key: str):
        self.resume = Resume(Path(folder), key, f"layer-{key[:12]}")

    def resume_from(self, masks: Masks, source: Source, smaller: PreTrainedModel) -> int:
        """Load the layers that an earlier run has finished, with their kept units, and return their number."""
        saved = self.resume.load()
        if saved is None:
            return 0

        with self.resume.readable():
            masks.keep.update(Plan.from_dict(saved.values["plan"]).keep)
            passes = dict(saved.values["passes"])

        masks.irreversible = masks.irreversible or saved.number > 0
        for layer in range(saved.number):
            with source.at(layer, changes=True):
                fill_layer_(masks.model, masks.arch, layer, self.resume.tensors(layer + 1), smaller)

        source.resume_(saved.local, passes)
        return saved.number

    def save(self, layer: int, masks: Masks, source: Source) -> None:
        """Save a finished layer, with the hidden states that enter the next layer."""
        state = source.state()
        if state is None:
            return

        hidden_states, passes = state
        plan = Plan(masks.arch.model_type, dict(masks.keep))
        values = {"plan": plan.to_dict(), "passes": passes}
        weights = layer_list(masks.model, masks.arch)[layer].state_dict()
        self.resume.save(layer + 1, values, weights, hidden_states)
