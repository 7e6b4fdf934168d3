"""The rounds of one pruning: sweep, measure, re-weight, keep what has been reached."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from math import log
from pathlib import Path
from typing import TYPE_CHECKING

from .arch.shrink import shrunk_config
from .arch.spec import ArchSpec, Widths
from .calibration.blocks import split_samples
from .calibration.clock import Clock
from .calibration.evidence import Mixture
from .calibration.gradients import saliencies
from .calibration.manifest import Entry
from .calibration.passes import Passes, batches_of, passes_over
from .calibration.stored import Statistics, StoredPasses
from .checkpoint import Checkpoint, run_key
from .errors import StructPruneError
from .halving import halfway, whole_widths
from .hub import PLAN_NAME, check_reload, save_checked
from .measure import Measure
from .metrics import evaluating
from .plan import Plan
from .report import Report
from .reweight import reweighted
from .schedule import next_legal, round_widths
from .surgery import adopt_config_, shrink_block_, skeleton
from .sweep import Sweep


if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .calibration.blocks import Domain
    from .config import StructPruneConfig


def mixture(config: StructPruneConfig, domains: list[Domain]) -> Mixture:
    """How a config brings the evidence of domains together."""
    shares = tuple(domain.weight for domain in domains)
    return Mixture(shares, config.normalisation, config.aggregation, float(config.quantile))


def passes_of(sweep: Sweep, domains: list[Domain], statistics: Statistics | None, clock: Clock) -> Passes:
    """The evidence for a sweep: stored moments, or the domains run through its model as it is now.

    Args:
        sweep: Where gradients are entered, if its criterion needs them.
        domains: Calibration text.
        statistics: Stored moments of the dense model, in place of the text.
        clock: Takes the time of each domain.
    """
    model, spec, config = sweep.model, sweep.spec, sweep.config
    if statistics is not None:
        return StoredPasses(statistics, domains, sweep.criterion.needs_gradient, next(model.parameters()).device)
    batches = batches_of(domains, config.batch_size)
    if sweep.criterion.needs_gradient:
        sweep.saliency = saliencies(model, spec, batches, clock)
    correction = float(config.correction) if config.fits else 0.0
    return passes_over(model, spec, batches, clock, correction)


def dense_scores(
    model: PreTrainedModel,
    spec: ArchSpec,
    config: StructPruneConfig,
    domains: list[Domain],
    names: Collection[str],
    report: Report,
    statistics: Statistics | None = None,
) -> dict[tuple[int, str], Tensor]:
    """Scores of all units that compare over blocks and spaces, from one pass over the dense model.

    Args:
        model: It is left as it is.
        spec: Its description.
        config: Names the criterion.
        domains: Calibration text.
        names: Kinds of space.
        report: Takes the time.
        statistics: Stored moments of the model, in place of the text.
    """
    sweep = Sweep(model, spec, config, mixture(config, domains))
    clock = Clock(model.device)
    with evaluating(model), report.timed("ranking"):
        scores = sweep.scores(passes_of(sweep, domains, statistics, clock), names)
    report.note_domains(clock.seconds, [domain.name for domain in domains])
    return scores


@dataclass
class Rounds:
    """Prunes a model in place to given widths.

    Attributes:
        model: The model that is changed.
        spec: Its description.
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
    spec: ArchSpec
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
            widths: Number of units to keep, by space, in every block or by block; they have to be legal.

        Raises:
            StructPruneError: If no width holds `max_perplexity_ratio`, or a checkpoint belongs to another run.
        """
        config = self.config
        if self.measure is None and config.measures:
            self.measure = Measure(self.domains, self.spec.causal)
            self.measure.before(self.model)
        self.sweep = Sweep(self.model, self.spec, config, mixture(config, self.domains))
        steps = round_widths(config, self.spec, widths)
        if config.keep_rounds or config.max_perplexity_ratio is not None:
            steps = [next_legal(self.model.config, self.spec, step) for step in steps]
        done = 0
        if config.checkpoint_dir:
            self.checkpoint = Checkpoint(Path(config.checkpoint_dir), run_key(config, self.model, self._text(), steps))
            done, self.report.rounds = self.checkpoint.load_(self.sweep)
        if config.max_perplexity_ratio is not None:
            return self._within_floor_(steps, done)
        new_config = shrunk_config(self.model.config, self.spec, widths, self.biased)
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
        """The domains with as many blocks each as its present weight is worth, so that what counts more is known
        better; the sum stays the same.
        """
        if not self.config.reweights or self.statistics is not None:
            return self.domains
        counts = split_samples(sum(len(domain.blocks) for domain in self.domains), self.sweep.mixture.shares)
        return [domain.portion(count) for domain, count in zip(self.domains, counts, strict=True)]

    def _ratios(self) -> dict[str, float]:
        """Perplexity over the dense model's, by domain; nothing where no setting asks for it."""
        if self.measure is None or not (self.config.measures and self.spec.causal):
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
        whole = whole_widths(self.spec, steps[-1])
        good, bad, state = (steps[done - 1] if done else None), None, self.sweep.snapshot()
        for number, step in enumerate(steps[done:], start=done + 1):
            if not self._holds_(number, step):
                bad = step
                break
            good, state, done = step, self.sweep.snapshot(), number
            self._leave(number, step)
        while bad is not None:
            middle = halfway(self.config, self.model.config, self.spec, good or whole, bad)
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
        shrink_(self.model, self.spec, self.sweep.plan, good, self.biased)
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
        shrink_(copy, self.spec, plan, step, self.biased)
        folder = Path(str(self.config.checkpoint_dir)) / f"round-{number}"

        def write(staging: Path) -> None:
            self.config.save_pretrained(staging)
            plan.save(staging / PLAN_NAME)

        save_checked(copy, folder, self.tokenizer, True, write, check_reload)


def shrink_(model: PreTrainedModel, spec: ArchSpec, plan: Plan, widths: Widths, biased: tuple[str, ...] = ()) -> None:
    """Shrink a model whose removed units have been silenced.

    Args:
        model: The model that is changed.
        spec: Its description.
        plan: What is kept.
        widths: The same in numbers.
        biased: Spaces whose consumers get a bias.
    """
    config = shrunk_config(model.config, spec, widths, biased)
    smaller = skeleton(model, config)
    for layer in range(spec.num_blocks):
        shrink_block_(model, spec, layer, plan, smaller)
    adopt_config_(model, config, smaller)
