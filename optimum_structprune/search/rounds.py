"""Rounds inside the layers: all but the last only mask units, so that every round fits the dense weights anew."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from ..arch.meta import shrunk_skeleton
from ..arch.modules import adopt_config_
from ..arch.spec import ArchSpec, Widths
from ..forward.metrics import same_outputs
from ..pruning.checkpoint import LayerCheckpoint, run_key
from ..pruning.run import Run, Step
from ..record.plan import Plan
from ..removals.cut import shrink_
from ..system.resume import Resume, Saved
from ..system.stages import progress
from ..widths.budget import biased_spaces
from .masked import MaskedPruning, Snapshot


def prune_in_rounds_(run: Run, step: Step) -> Plan:
    """One round: mask units, or in the last one remove all that are masked. A round that an earlier run of the same
    checkpoint has finished is passed over.
    """
    rounds: Rounds = run.rounds or Rounds(run, step)
    run.rounds = rounds
    if step.number <= rounds.done:
        return Plan(run.arch.model_type, {})
    smaller = shrunk_skeleton(run.model, run.arch, step.widths, rounds.biased) if step.last else None
    rounds.run_(step.widths, smaller)
    if smaller is None:
        rounds.record(step.widths, rounds.ratios())
        rounds.finish()
        return Plan(run.arch.model_type, {})
    rounds.record(step.widths, {})
    adopt_config_(run.model, smaller)
    run.rounds = None
    return rounds.pruning.plan


class Rounds:
    """The rounds of one pruning inside the layers, up to the one that shrinks the model; `done` are finished."""

    def __init__(self, run: Run, step: Step):
        self.run, self.arch, config = run, run.arch, run.config
        self.total = max(step.count, config.rounds)
        self.biased = biased_spaces(config, run.arch, step.target)
        self.pruning = MaskedPruning(run.model, run.arch, config)
        self.done = 0
        self.finished_rounds: Resume | None = None
        self.finished_layers = LayerCheckpoint.of(run, step)
        if config.checkpoint_dir is not None:
            key = run_key(run.data, run.model, step.target)
            self.finished_rounds = Resume(Path(config.checkpoint_dir), key, "round")
            if (saved := self.finished_rounds.load()) is not None:
                self._take_over_rounds_(self.finished_rounds, saved)

    def run_(self, widths: Widths, smaller: PreTrainedModel | None = None) -> None:
        """Run a round: it only masks units, or with the `smaller` model without weights lets each layer lose them as
        soon as it is finished, and remembers it.
        """
        run, pruning, number, count = self.run, self.pruning, self.done + 1, self.arch.num_layers
        total, done = max(number, self.total), 0
        try:
            with run.report.timed(f"round {number}"):
                method, source = pruning.method(run.data), run.data.source(run.model, self.arch, run.data.feedback)
                store = None if smaller is None else self.finished_layers
                if store is not None and smaller is not None:
                    done = store.take_over_(run, source, pruning.keep, smaller)
                    pruning.forget_(range(done))
                # The bar counts the layers of all rounds, for the time that is left.
                bar = {"initial": (number - 1) * count + done, "total": total * count, "unit": "layer"}
                for layer in progress(range(done, count), desc=f"round {number}/{total}", **bar):
                    with source.at(layer, changes=True):
                        pruning.prune_layer_(layer, source, method, widths, smaller)
                        if store is not None:
                            store.save(run, layer, pruning.keep, source)
        finally:
            run.changed = run.changed or pruning.shrunk

    def remove_masked_(self, widths: Widths) -> Plan:
        """Take what is masked out of the model, without another round."""
        self.run.changed = self.pruning.shrunk = True
        with same_outputs("The model", self.run.model):
            shrink_(self.run.model, self.arch, self.pruning.plan, widths, self.biased)
        return self.pruning.plan

    def undo_(self) -> None:
        """Make the model dense again, unless it has lost units for good."""
        self.pruning.undo_()

    def ratios(self) -> dict[str, float]:
        """Perplexity over the dense model's, by domain; nothing where no setting asks for it."""
        measure = self.run.measure
        if measure is None or not (self.run.config.measures_rounds and self.arch.causal):
            return {}
        with self.run.report.timed("perplexity"):
            return measure.ratios(self.run.model, self.arch)

    def record(self, widths: Widths, ratios: Mapping[str, float], **more: bool) -> None:
        """Enter a round into the report, and weigh the domains anew for the next."""
        config, data = self.run.config, self.run.data
        if config.measures_rounds:
            shares = dict(zip(data.names, data.shares, strict=True))
            entry = {"widths": dict(widths), "shares": shares, "perplexity_ratio": dict(ratios), **more}
            self.run.report.rounds.append(entry)
        if config.reweights and ratios:
            self.run.data = data.reweighted(ratios)

    def finish(self) -> None:
        """Count a round as finished, and put on disk what it has reached."""
        self.done += 1
        if self.finished_rounds is not None:
            snapshot = self.pruning.snapshot()
            values = {
                "shares": self.run.data.shares,
                "plan": self.pruning.plan.to_dict(),
                "measured": self.run.report.rounds,
            }
            self.finished_rounds.save(self.done, values, _tensors(snapshot))

    def _take_over_rounds_(self, store: Resume, saved: Saved) -> None:
        """Take over the rounds that an earlier run has finished."""
        with store.readable():
            keep = Plan.from_dict(saved.values["plan"]).keep
            snapshot = _snapshot(self.arch, keep, saved.tensors)
            measured = [_measured(entry) for entry in saved.values["measured"]]
            shares = tuple(map(float, saved.values["shares"]))
        self.run.report.details.resumed, self.run.report.rounds = True, measured
        self.run.data = replace(self.run.data, shares=shares)
        self.pruning.restore_(snapshot)
        self.done = saved.number


def _tensors(snapshot: Snapshot) -> dict[str, Tensor]:
    """The values of the consumers, by their number in the snapshot."""
    tensors = {}
    for index, (weight, bias) in enumerate(snapshot.consumers.values()):
        tensors[f"{index}.weight"] = weight
        if bias is not None:
            tensors[f"{index}.bias"] = bias
    return tensors


def _snapshot(
    arch: ArchSpec, keep: Mapping[tuple[int, str], tuple[int, ...]], tensors: Mapping[str, Tensor]
) -> Snapshot:
    """Inverse of `_tensors`."""
    axes = [axis for space in arch.spaces if space.key in keep for axis in space.consumers]
    return Snapshot(keep, {axis: (tensors[f"{i}.weight"], tensors.get(f"{i}.bias")) for i, axis in enumerate(axes)})


def _measured(entry: Mapping[str, Any]) -> dict[str, Any]:
    """An entry of the report whose layer numbers, of which JSON has made strings, are numbers again."""
    widths = {
        name: {int(layer): units for layer, units in width.items()} if isinstance(width, dict) else width
        for name, width in entry["widths"].items()
    }
    return {**entry, "widths": widths}
