"""Steps that prune the units inside the layers: rounds, of which all but the last only mask."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..arch.meta import skeleton
from ..arch.shrink import shrunk_config
from ..arch.spec import LAYER, MODEL, Widths
from ..saving.hub import check_reload, save_checked
from ..surgery.cut import adopt_config_, shrink_
from ..surgery.plan import PLAN_NAME, Plan
from ..widths.budget import biased_spaces
from .checkpoint import Checkpoint, run_key
from .evidence import Evidence
from .progress import Progress
from .run import Run
from .steps import Step
from .sweep import Sweep
from .units import Snapshot


def prune_units_(run: Run, step: Step) -> Plan:
    """One round: mask units, or in the last one remove all that are masked. A round that an earlier run of the same
    checkpoint has finished is passed over.
    """
    rounds: Rounds = run.rounds or Rounds(run, step)
    run.rounds = rounds
    if step.number <= rounds.done:
        return Plan(rounds.arch.model_type, {})
    if step.last:
        rounds.shrink_(step.widths)
        run.rounds = None
        return rounds.sweep.plan
    rounds.mask_(step.widths)
    rounds.record(step.widths, rounds.ratios())
    rounds.leave(step.widths)
    return Plan(rounds.arch.model_type, {})


class Rounds:
    """The rounds of one pruning inside the layers, from the first to the one that shrinks the model.

    Attributes:
        evidence: What is known of the text, with the weights that the domains have in the next round.
        done: The number of finished rounds.
    """

    def __init__(self, run: Run, step: Step):
        self.run, self.config, self.arch = run, run.config, run.arch
        self.total = max(step.count, self.config.rounds)
        self.biased = biased_spaces(self.config, self.arch, step.target)
        self.sweep = Sweep(run.model, self.arch, self.config)
        self.evidence: Evidence = run.evidence
        self.checkpoint: Checkpoint | None = None
        self.progress: Progress | None = None
        self.done = 0
        if self.config.checkpoint_dir is not None:
            key = run_key(self.config, run.model, run.evidence.entries(), step.target)
            self.checkpoint = Checkpoint(Path(self.config.checkpoint_dir), key)
            self.progress = Progress(Path(self.config.checkpoint_dir), f"{key}/{step.count}")
            run.report.details.resumed = self.progress.check() is not None
            if (state := self.checkpoint.load(self.arch)) is not None:
                self.done, run.report.rounds = state.number, state.measured
                run.report.details.resumed = True
                self.evidence = replace(self.evidence, shares=state.shares)
                self.sweep.resume_(state.snapshot)

    def mask_(self, widths: Widths) -> None:
        """A round that only masks."""
        self._sweep_(widths, None)

    def shrink_(self, widths: Widths) -> None:
        """The last round: masked units leave the model."""
        new_config = shrunk_config(self.run.model.config, self.arch, widths, self.biased)
        smaller = skeleton(self.run.model, new_config)
        try:
            self._sweep_(widths, smaller)
        finally:
            self.run.changed = self.run.changed or self.sweep.shrunk
        self._note_choices()
        self.record(widths, {})
        adopt_config_(self.run.model, new_config, smaller)

    def remove_masked_(self, widths: Widths) -> Plan:
        """Take what is masked out of the model, without another round."""
        self.run.changed = self.sweep.shrunk = True
        self._note_choices()
        shrink_(self.run.model, self.arch, self.sweep.plan, widths, self.biased)
        return self.sweep.plan

    def ratios(self) -> dict[str, float]:
        """Perplexity over the dense model's, by domain; nothing where no setting asks for it."""
        measure = self.run.measure
        if measure is None or not (self.config.measures and self.arch.causal):
            return {}
        with self.run.report.timed("perplexity"):
            return measure.ratios(self.run.model)

    def record(self, widths: Widths, ratios: Mapping[str, float], **more: bool) -> None:
        """Enter a round into the report, and weigh the domains anew for the next."""
        if self.config.measures:
            shares = dict(zip(self.evidence.names, self.evidence.shares, strict=True))
            entry = {"widths": dict(widths), "shares": shares, "perplexity_ratio": dict(ratios), **more}
            self.run.report.rounds.append(entry)
        if self.config.reweights and ratios:
            self.evidence = self.evidence.reweighted(ratios)

    def leave(self, widths: Widths, resumable: bool = True) -> None:
        """Count a round as finished, and put on disk what it has reached."""
        self.done += 1
        if self.config.keep_rounds:
            self._save_model(widths)
        if self.checkpoint is not None and resumable:
            self.checkpoint.save(self.snapshot(), self.evidence.shares, self.done, self.run.report.rounds)

    def snapshot(self) -> Snapshot:
        """Copies of what the rounds have reached."""
        return self.sweep.snapshot()

    def restore_(self, snapshot: Snapshot, shares: tuple[float, ...]) -> None:
        """Go back to a snapshot and to the weights that the domains had then."""
        self.sweep.restore_(snapshot)
        self.evidence = replace(self.evidence, shares=shares)

    def undo_(self) -> None:
        """Make the model dense again, unless units have been removed for good."""
        if not self.sweep.shrunk:
            self.sweep.consumers.undo_()

    def _sweep_(self, widths: Widths, smaller: PreTrainedModel | None) -> None:
        number = self.done + 1
        with self.run.report.timed(f"round {number}"):
            passes = self.evidence.passes(self.run.model, self.arch)
            title = f"round {number}/{max(number, self.total)}"
            self.sweep.run_(passes, self.evidence.mixture, widths, smaller, title, self.progress, number, self.total)

    def _note_choices(self) -> None:
        """Hand the run what was noted of the choices, under the numbers that the layers have in the dense model."""
        layers = self.run.plan.keep.get((MODEL, LAYER))
        for (layer, name), choice in self.sweep.choices.items():
            self.run.choices[layer if layers is None else layers[layer], name] = choice

    def _save_model(self, widths: Widths) -> None:
        copy, plan = deepcopy(self.run.model), self.sweep.plan
        shrink_(copy, self.arch, plan, widths, self.biased)
        # What the round was asked for, whatever has chosen it.
        chosen: Any = {"widths": dict(widths), "allocation": "uniform", "losses_dir": None, "skip_layers": ()}
        config = replace(self.config, sparsity=None, budget=None, **chosen)

        def write(staging: Path) -> None:
            config.save_pretrained(staging)
            plan.save(staging / PLAN_NAME)

        folder = Path(str(self.config.checkpoint_dir)) / f"round-{self.done}"
        save_checked(copy, folder, self.run.tokenizer, True, write, check_reload)
