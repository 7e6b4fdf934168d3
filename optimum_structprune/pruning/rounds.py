"""The rounds of one pruning: sweep, measure, re-weight, keep what has been reached."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from math import log
from pathlib import Path
from typing import TYPE_CHECKING

from ..arch.meta import skeleton
from ..arch.shrink import shrunk_config
from ..arch.spec import ArchSpec, Widths
from ..calibration.stored import Statistics
from ..domains.load import split_samples
from ..domains.manifest import Entry
from ..domains.reweight import reweighted
from ..errors import StructPruneError
from ..forward.clock import Clock
from ..saving.hub import PLAN_NAME, check_reload, save_checked
from ..saving.report import Report
from ..surgery.cut import adopt_config_, shrink_
from ..surgery.plan import Plan
from ..widths.schedule import next_legal, round_widths
from .checkpoint import Checkpoint, run_key
from .evidence import mixture, passes_of
from .floor import halfway, whole_widths
from .measure import Measure
from .sweep import Sweep


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..config.pruning import StructPruneConfig
    from ..domains.load import Domain


@dataclass
class Rounds:
    """Prunes a model in place to given widths.

    Attributes:
        model: The model that is changed.
        arch: Its description.
        config: How to prune.
        domains: Calibration text.
        report: Takes the time and what each round reached.
        measure: What the dense model gives on held-out text; None where the model is dense still.
        biased: Spaces whose consumers get a bias.
        tokenizer: Saved beside the models that `keep_rounds` leaves.
        checkpoint: What remembers the rounds, where a folder is named.
        statistics: Stored moments of the dense model, in place of the text.
    """

    model: PreTrainedModel
    arch: ArchSpec
    config: StructPruneConfig
    domains: list[Domain]
    report: Report
    measure: Measure | None = None
    biased: tuple[str, ...] = ()
    tokenizer: PreTrainedTokenizerBase | None = None
    checkpoint: Checkpoint | None = None
    statistics: Statistics | None = None

    def run_(self, widths: Widths) -> Plan:
        """All rounds; returns what is kept.

        Args:
            widths: Number of units to keep, by space, in every layer or by layer; they have to be legal.

        Raises:
            StructPruneError: If no width holds `max_perplexity_ratio`, or a checkpoint belongs to another run.
        """
        config = self.config
        if self.measure is None and config.measures:
            self.measure = Measure(self.domains, self.arch.causal)
            self.measure.before(self.model)
        self.sweep = Sweep(self.model, self.arch, config, mixture(config, self.domains))
        steps = round_widths(config, self.arch, widths)
        if config.keep_rounds or config.max_perplexity_ratio is not None:
            steps = [next_legal(self.model.config, self.arch, step) for step in steps]
        done = 0
        if config.checkpoint_dir:
            self.checkpoint = Checkpoint(Path(config.checkpoint_dir), run_key(config, self.model, self._text(), steps))
            done, self.report.rounds = self.checkpoint.load_(self.sweep)
        if config.max_perplexity_ratio is not None:
            return self._within_floor_(steps, done)
        new_config = shrunk_config(self.model.config, self.arch, widths, self.biased)
        smaller = skeleton(self.model, new_config)
        for number, step in enumerate(steps[done:-1], start=done + 1):
            self._round_(number, step)
            self._note_(step, self._ratios())
            self._leave(number, step)
        self._round_(len(steps), widths, smaller)
        self._note_(widths, {})
        adopt_config_(self.model, new_config, smaller)
        return self.sweep.plan

    def _text(self) -> Sequence[Entry]:
        """What identifies the calibration text."""
        if self.statistics is not None:
            return self.statistics.manifest(self.domains).domains
        return [Entry.of(domain) for domain in self.domains]

    def _round_(self, number: int, step: Widths, smaller: PreTrainedModel | None = None) -> None:
        config, sweep, clock = self.config, self.sweep, Clock(self.model.device)
        with self.report.timed(f"round {number}"):
            passes = passes_of(sweep, self._portions(), self.statistics, clock)
            sweep.run_(passes, step, smaller, f"round {number}/{max(number, config.rounds)}")
        self.report.note_domains(clock.seconds, [domain.name for domain in self.domains])

    def _portions(self) -> list[Domain]:
        """The domains with as many samples each as its present weight is worth, so that what counts more is known
        better; the sum stays the same.
        """
        if not self.config.reweights or self.statistics is not None:
            return self.domains
        counts = split_samples(sum(len(domain.samples) for domain in self.domains), self.sweep.mixture.shares)
        return [domain.portion(count) for domain, count in zip(self.domains, counts, strict=True)]

    def _ratios(self) -> dict[str, float]:
        """Perplexity over the dense model's, by domain; nothing where no setting asks for it."""
        if self.measure is None or not (self.config.measures and self.arch.causal):
            return {}
        with self.report.timed("perplexity"):
            return self.measure.ratios(self.model)

    def _note_(self, step: Widths, ratios: Mapping[str, float], **more: bool) -> None:
        """Enter a round into the report, and weigh the domains anew for the next."""
        config, mixed = self.config, self.sweep.mixture
        if config.measures:
            shares = dict(zip((domain.name for domain in self.domains), mixed.shares, strict=True))
            entry = {"widths": dict(step), "shares": shares, "perplexity_ratio": dict(ratios), **more}
            self.report.rounds.append(entry)
        if config.reweights and ratios:
            asked = [domain.weight for domain in self.domains]
            losses = [log(value) for value in ratios.values()]
            rate = float(config.adaptive_rate) or 1.0
            mixed.shares = reweighted(mixed.shares, asked, losses, rate, config.objective)

    def _leave(self, number: int, step: Widths) -> None:
        """Put on disk what a round has reached."""
        if self.config.keep_rounds:
            self._keep(number, step)
        if self.checkpoint is not None:
            self.checkpoint.save(self.sweep, number, self.report.rounds)

    def _within_floor_(self, steps: Sequence[Widths], done: int) -> Plan:
        """Rounds as long as every domain holds the floor, then halvings between the last widths that hold it and the
        first that do not, until there are no legal ones in between.
        """
        whole = whole_widths(self.arch, steps[-1])
        good, bad, state = (steps[done - 1] if done else None), None, self.sweep.snapshot()
        for number, step in enumerate(steps[done:], start=done + 1):
            if not self._holds_(number, step):
                bad = step
                break
            good, state, done = step, self.sweep.snapshot(), number
            self._leave(number, step)
        while bad is not None:
            middle = halfway(self.config, self.model.config, self.arch, good or whole, bad)
            if middle in (good, bad, whole):
                break
            self.sweep.restore_(state)
            if self._holds_(done + 1, middle):
                good, state, done = middle, self.sweep.snapshot(), done + 1
                if self.config.keep_rounds:
                    self._keep(done, middle)
            else:
                bad = middle
        self.sweep.restore_(state)
        if good is None:
            raise StructPruneError(self._out_of_reach())
        shrink_(self.model, self.arch, self.sweep.plan, good, self.biased)
        return self.sweep.plan

    def _holds_(self, number: int, step: Widths) -> bool:
        """Whether every domain holds the floor after a round to these widths."""
        self._round_(number, step)
        ratios = self._ratios()
        holds = max(ratios.values()) <= float(self.config.max_perplexity_ratio or 0)
        self._note_(step, ratios, holds=holds)
        return holds

    def _out_of_reach(self) -> str:
        last = self.report.rounds[-1]
        name = max(last["perplexity_ratio"], key=last["perplexity_ratio"].get)
        ratio = last["perplexity_ratio"][name]
        return (
            f"max_perplexity_ratio={self.config.max_perplexity_ratio} is not held by domain {name!r} even with widths "
            f"{last['widths']}, the nearest to the dense ones, which give {ratio:.4f}; allow that, or name a smaller "
            "round_to."
        )

    def _keep(self, number: int, step: Widths) -> None:
        """Save the model of this round as an ordinary, smaller one."""
        copy, plan = deepcopy(self.model), self.sweep.plan
        shrink_(copy, self.arch, plan, step, self.biased)
        folder = Path(str(self.config.checkpoint_dir)) / f"round-{number}"

        def write(staging: Path) -> None:
            self.config.save_pretrained(staging)
            plan.save(staging / PLAN_NAME)

        save_checked(copy, folder, self.tokenizer, True, write, check_reload)
