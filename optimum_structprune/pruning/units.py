"""The step that prunes the units inside the layers, and what it keeps on disk to go on from after a kill."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from transformers import PreTrainedModel

from ..arch.meta import shrunk_skeleton
from ..arch.modules import adopt_config_, layer_list
from ..arch.spec import Widths
from ..method.loop import prune_layers_
from ..method.shrink import fill_layer_
from ..record.plan import Plan
from ..sources.data import CalibrationData, Source, method_of
from ..system.offloading import give_back_free_memory
from ..system.resume import Resume
from ..system.stages import progress
from ..widths.budget import biased_spaces
from .run import Run, Step


# Fields that may differ between a run that was stopped and the one that goes on; the text is compared by its hashes.
IGNORED_ON_RESUME = ("checkpoint_dir", "losses_dir", "batch_size", "domains")


def prune_units_(run: Run, step: Step) -> Plan:
    """Bring all layers to the widths of a step, each as soon as it is its turn; see `method.loop.prune_layers_`."""
    model, arch, data = run.model, run.arch, run.data
    smaller = shrunk_skeleton(model, arch, step.widths, biased_spaces(run.config, arch, step.target))
    keep: dict[tuple[int, str], tuple[int, ...]] = {}
    checkpoint = LayerCheckpoint.of(run, step)
    try:
        with run.report.timed("round 1"):
            method = method_of(run.config, data.shares, statistics=data.whole_model_statistics(model, arch))
            source = data.source(model, arch, data.feedback)
            done = 0 if checkpoint is None else checkpoint.take_over_(run, source, keep, smaller)
            layers = progress(
                range(done, arch.num_layers), desc="pruning", initial=done, total=arch.num_layers, unit="layer"
            )

            def finished(layer: int) -> None:
                give_back_free_memory()
                if checkpoint is not None:
                    checkpoint.save(run, layer, keep, source)

            prune_layers_(model, arch, source, method, step.widths, smaller, keep, layers, finished)
    finally:
        run.changed = run.changed or bool(keep)
    adopt_config_(model, smaller)
    return Plan(arch.model_type, keep)


def run_key(data: CalibrationData, model: PreTrainedModel, target: Widths) -> str:
    """The hash that identifies a run: its config, the dense model, the text and the widths that are aimed at."""
    settings = {name: value for name, value in data.config.to_dict().items() if name not in IGNORED_ON_RESUME}
    return data.key(model, settings, target)


class LayerCheckpoint:
    """The layers of one run that are finished, in a folder."""

    def __init__(self, folder: Path, key: str):
        self.resume = Resume(folder, key, "layer", every=True)

    @classmethod
    def of(cls, run: Run, step: Step) -> LayerCheckpoint | None:
        """That of a step, in the folder that the config of a run names; None where it names none."""
        folder = run.config.checkpoint_dir
        if folder is None:
            return None
        checkpoint = cls(Path(folder), f"{run_key(run.data, run.model, step.target)}/{step.count}")
        run.report.details.resumed = checkpoint.resume.check() is not None
        return checkpoint

    def take_over_(
        self, run: Run, source: Source, keep: dict[tuple[int, str], tuple[int, ...]], smaller: PreTrainedModel
    ) -> int:
        """Take over the layers that an earlier run has finished with their kept units, and return their number."""
        saved = self.resume.load()
        if saved is None:
            return 0
        with self.resume.readable():
            keep |= Plan.from_dict(saved.values["plan"]).keep
            reached = dict(saved.values["passes"])
        for layer in range(saved.number):
            with source.at(layer, changes=True):
                fill_layer_(run.model, run.arch, layer, self.resume.tensors(layer + 1), smaller)
        source.resume_(saved.local, reached)
        return saved.number

    def save(self, run: Run, layer: int, keep: Mapping[tuple[int, str], tuple[int, ...]], source: Source) -> None:
        """Put on disk what a layer has become, and what the source has reached behind it, if it says so."""
        if (state := source.state()) is not None:
            tensors, reached = state
            values = {"plan": Plan(run.arch.model_type, dict(keep)).to_dict(), "passes": reached}
            self.resume.save(layer + 1, values, layer_list(run.model, run.arch)[layer].state_dict(), tensors)
