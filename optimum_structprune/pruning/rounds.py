"""Steps that prune the units inside the layers: rounds, of which all but the last only mask."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils.logging import tqdm

from ..arch.load import layer_list
from ..arch.meta import shrunk_skeleton
from ..arch.spec import ArchSpec, Widths
from ..calibration.passes import Passes, PassesState
from ..forward.same import outputs_for, same_outputs
from ..surgery.cut import adopt_config_, shrink_
from ..surgery.plan import Plan
from ..system.resume import Resume, Saved
from ..widths.budget import biased_spaces
from .evidence import Evidence
from .run import Run, Step
from .sweep import Snapshot, Sweep


# Fields that may differ between a run that was stopped and the one that goes on; the text is compared by its hashes.
FREE = ("checkpoint_dir", "losses_dir", "batch_size", "domains")


def prune_units_(run: Run, step: Step) -> Plan:
    """One round: mask units, or in the last one remove all that are masked. A round that an earlier run of the same
    checkpoint has finished is passed over.
    """
    rounds: Rounds = run.rounds or Rounds(run, step)
    run.rounds = rounds
    if step.number <= rounds.done:
        return Plan(run.arch.model_type, {})
    skeleton = shrunk_skeleton(run.model, run.arch, step.widths, rounds.biased) if step.last else None
    rounds.run_(step.widths, skeleton)
    if skeleton is None:
        rounds.record(step.widths, rounds.ratios())
        rounds.finish()
        return Plan(run.arch.model_type, {})
    rounds.record(step.widths, {})
    adopt_config_(run.model, skeleton)
    run.rounds = None
    return rounds.sweep.plan


def run_key(evidence: Evidence, model: PreTrainedModel, target: Widths) -> str:
    """What tells a run from others: its config, the dense model, the text and the widths that are aimed at."""
    settings = {name: value for name, value in evidence.config.to_dict().items() if name not in FREE}
    return evidence.key(model, settings, target)


class Rounds:
    """The rounds of one pruning inside the layers, up to the one that shrinks the model; `done` are finished."""

    def __init__(self, run: Run, step: Step):
        self.run, self.arch, config = run, run.arch, run.config
        self.total = max(step.count, config.rounds)
        self.biased = biased_spaces(config, run.arch, step.target)
        self.sweep = Sweep(run.model, run.arch, config)
        self.done = 0
        self.finished_rounds: Resume | None = None
        self.finished_layers: Resume | None = None
        if config.checkpoint_dir is not None:
            key = run_key(run.evidence, run.model, step.target)
            folder = Path(config.checkpoint_dir)
            self.finished_rounds = Resume(folder, key, "round")
            self.finished_layers = Resume(folder, f"{key}/{step.count}", "layer", every=True)
            run.report.details.resumed = self.finished_layers.check() is not None
            if (saved := self.finished_rounds.load()) is not None:
                self._take_over_rounds_(self.finished_rounds, saved)

    def run_(self, widths: Widths, skeleton: PreTrainedModel | None = None) -> None:
        """Run a round: it only masks units, or with the `skeleton` of the smaller model lets each layer lose them as
        soon as it is finished, and remembers it.
        """
        run, sweep, number, count = self.run, self.sweep, self.done + 1, self.arch.num_layers
        total, done = max(number, self.total), 0
        try:
            with run.report.timed(f"round {number}"):
                passes, mixture = run.evidence.passes(run.model, self.arch), run.evidence.mixture
                store = None if skeleton is None else self.finished_layers
                if store is not None and skeleton is not None:
                    done = self._take_over_layers_(store, passes, skeleton)
                # The bar counts the layers of all rounds, for the time that is left.
                bar = {"initial": (number - 1) * count + done, "total": total * count, "unit": "layer"}
                for layer in tqdm(range(done, count), desc=f"round {number}/{total}", **bar):
                    with sweep.placement.at(layer, changes=True):
                        sweep.prune_layer_(layer, passes, mixture, widths, skeleton)
                        if store is not None:
                            self._remember_layer(store, layer, passes.state())
        finally:
            run.changed = run.changed or sweep.shrunk

    def remove_masked_(self, widths: Widths) -> Plan:
        """Take what is masked out of the model, without another round."""
        self.run.changed = self.sweep.shrunk = True
        with same_outputs("The model", lambda: outputs_for(self.run.model)):
            shrink_(self.run.model, self.arch, self.sweep.plan, widths, self.biased)
        return self.sweep.plan

    def undo_(self) -> None:
        """Make the model dense again, unless it has lost units for good."""
        self.sweep.undo_()

    def ratios(self) -> dict[str, float]:
        """Perplexity over the dense model's, by domain; nothing where no setting asks for it."""
        measure = self.run.measure
        if measure is None or not (self.run.config.measures_rounds and self.arch.causal):
            return {}
        with self.run.report.timed("perplexity"):
            return measure.ratios(self.run.model, self.arch)

    def record(self, widths: Widths, ratios: Mapping[str, float], **more: bool) -> None:
        """Enter a round into the report, and weigh the domains anew for the next."""
        config, evidence = self.run.config, self.run.evidence
        if config.measures_rounds:
            shares = dict(zip(evidence.names, evidence.shares, strict=True))
            entry = {"widths": dict(widths), "shares": shares, "perplexity_ratio": dict(ratios), **more}
            self.run.report.rounds.append(entry)
        if config.reweights and ratios:
            self.run.evidence = evidence.reweighted(ratios)

    def finish(self) -> None:
        """Count a round as finished, and put on disk what it has reached."""
        self.done += 1
        if self.finished_rounds is not None:
            snapshot = self.sweep.snapshot()
            values = {
                "shares": self.run.evidence.shares,
                "plan": self.sweep.plan.to_dict(),
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
        self.run.evidence = replace(self.run.evidence, shares=shares)
        self.sweep.restore_(snapshot)
        self.done = saved.number

    def _remember_layer(self, store: Resume, layer: int, state: PassesState | None) -> None:
        """Put on disk what a layer has become, and where the passes are behind it, if they say so."""
        if state is not None:
            values = {"plan": self.sweep.plan.to_dict(), "passes": state.values}
            store.save(layer + 1, values, layer_list(self.run.model, self.arch)[layer].state_dict(), state.tensors)

    def _take_over_layers_(self, store: Resume, passes: Passes, skeleton: PreTrainedModel) -> int:
        """Take over the layers that an earlier run has finished, and return their number."""
        saved, sweep = store.load(), self.sweep
        if saved is None:
            return 0
        with store.readable():
            sweep.keep = dict(Plan.from_dict(saved.values["plan"]).keep)
            state = PassesState(saved.local, dict(saved.values["passes"]))
        for layer in range(saved.number):
            with sweep.placement.at(layer, changes=True):
                sweep.fill_layer_(layer, store.tensors(layer + 1), skeleton)
        passes.resume_(state)
        return saved.number


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
    axes = [axis for space in arch.spaces if space.key in keep for axis in space.into]
    return Snapshot(keep, {axis: (tensors[f"{i}.weight"], tensors.get(f"{i}.bias")) for i, axis in enumerate(axes)})


def _measured(entry: Mapping[str, Any]) -> dict[str, Any]:
    """An entry of the report whose layer numbers, of which JSON has made strings, are numbers again."""
    widths = {
        name: {int(layer): units for layer, units in width.items()} if isinstance(width, dict) else width
        for name, width in entry["widths"].items()
    }
    return {**entry, "widths": widths}
