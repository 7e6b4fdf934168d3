"""The rounds of one pruning: sweep, measure, re-weight, keep what has been reached."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from copy import deepcopy
from dataclasses import dataclass
from math import log
from pathlib import Path
from typing import TYPE_CHECKING

from .allocation import next_legal, round_widths
from .arch.shrink import shrunk_config
from .arch.spec import ArchSpec, Widths
from .calibration.evidence import Mixture
from .calibration.gradients import saliencies
from .calibration.passes import batches_of, guard_batches, passes_over
from .checkpoint import load_round_, run_key, save_round
from .errors import StructPruneError
from .hub import PLAN_NAME, check_reload, save_checked
from .measure import Measure
from .plan import Plan
from .report import Report
from .reweight import reweighted
from .surgery import adopt_config_, shrink_block_, skeleton
from .sweep import Sweep


if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .calibration.blocks import Domain
    from .config import StructPruneConfig

# Halvings between the last widths that hold the floor and the first that do not.
BISECTIONS = 4


def mixture(config: StructPruneConfig, domains: list[Domain]) -> Mixture:
    """How a config brings the evidence of domains together."""
    shares = tuple(domain.weight for domain in domains)
    return Mixture(shares, config.normalisation, config.aggregation, float(config.quantile))


def dense_scores(
    model: PreTrainedModel, spec: ArchSpec, config: StructPruneConfig, domains: list[Domain], names: Collection[str]
) -> dict[tuple[int, str], Tensor]:
    """Scores of all units that compare over blocks and spaces, from one pass over the dense model.

    Args:
        model: It is left as it is.
        spec: Its description.
        config: Names the criterion.
        domains: Calibration text.
        names: Kinds of space.
    """
    sweep = Sweep(model, spec, config, mixture(config, domains))
    batches = batches_of(domains, config.batch_size)
    training = model.training
    model.eval()
    if sweep.criterion.needs_gradient:
        sweep.saliency = saliencies(model, spec, batches)
    scores = sweep.scores(passes_over(model, spec, batches), names)
    model.train(training)
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
    """

    model: PreTrainedModel
    spec: ArchSpec
    config: StructPruneConfig
    domains: list[Domain]
    report: Report
    measure: Measure | None = None
    biased: tuple[str, ...] = ()
    tokenizer: PreTrainedTokenizerBase | None = None

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
        key = run_key(config, self.model, steps) if config.checkpoint_dir else ""
        done = load_round_(Path(config.checkpoint_dir), self.sweep, key) if config.checkpoint_dir else 0
        if config.max_perplexity_ratio is not None:
            return self._within_floor_(steps[done:], done, key)
        new_config = shrunk_config(self.model.config, self.spec, widths, self.biased)
        smaller = skeleton(self.model, new_config)
        for number, step in enumerate(steps[done:], start=done + 1):
            last = number == len(steps)
            self._round_(number, step, smaller if last else None)
            if not last:
                self._between_(number, step, key)
        adopt_config_(self.model, new_config, smaller)
        return self.sweep.plan

    def _round_(self, number: int, step: Widths, smaller: PreTrainedModel | None = None) -> None:
        config, sweep = self.config, self.sweep
        with self.report.timed(f"round {number}"):
            batches = batches_of(self.domains, config.batch_size)
            if sweep.criterion.needs_gradient:
                sweep.saliency = saliencies(self.model, self.spec, batches)
            if config.guard:
                batches = guard_batches(self.domains, config.batch_size)
            title = f"round {number}/{max(number, config.rounds)}"
            sweep.run_(passes_over(self.model, self.spec, batches), step, smaller, title)
        self.report.note_guard(sweep.guarded, float(config.damping))

    def _between_(self, number: int, step: Widths, key: str) -> float:
        """What is done after a round that is not the last; the largest ratio of perplexities, where one is taken."""
        config, ratio = self.config, 1.0
        if self.measure is not None and config.measures:
            with self.report.timed("perplexity"):
                ratios = self.measure.ratios(self.model)
            ratio = max(ratios.values())
            shares = dict(zip(ratios, self.sweep.mixture.shares, strict=True))
            self.report.rounds.append({"widths": dict(step), "perplexity_ratio": ratios, "shares": shares})
            if config.reweights:
                asked = [domain.weight for domain in self.domains]
                losses = [log(value) for value in ratios.values()]
                rate = float(config.adaptive_rate) or 1.0
                now = self.sweep.mixture.shares
                self.sweep.mixture.shares = reweighted(now, asked, losses, rate, config.objective)
        if config.keep_rounds:
            self._keep(number, step)
        if config.checkpoint_dir:
            save_round(Path(config.checkpoint_dir), self.sweep, number, key)
        return ratio

    def _within_floor_(self, steps: list, done: int, key: str) -> Plan:
        """Rounds as long as every domain holds the floor, then halves the last step until the floor is met."""
        floor = float(self.config.max_perplexity_ratio or 0)
        whole = {name: self._whole(name, width) for name, width in steps[0].items()}
        good, state, number = None, self.sweep.snapshot(), done
        bad: Widths = {}
        for step in steps:
            number += 1
            self._round_(number, step)
            if self._between_(number, step, key) > floor:
                bad = step
                break
            good, state = step, self.sweep.snapshot()
        for _ in range(BISECTIONS if bad else 0):
            middle = self._middle(good or whole, bad)
            if middle in (good, bad, whole):
                break
            self.sweep.restore_(state)
            number += 1
            self._round_(number, middle)
            if self._between_(number, middle, "") > floor:
                bad = middle
            else:
                good, state = middle, self.sweep.snapshot()
        self.sweep.restore_(state)
        if good is None:
            raise StructPruneError(
                f"max_perplexity_ratio={floor} is not held even with widths {bad}; "
                "allow a higher ratio, or ask for less."
            )
        shrink_(self.model, self.spec, self.sweep.plan, good, self.biased)
        return self.sweep.plan

    def _whole(self, name: str, like: int | Mapping[int, int]) -> int | dict[int, int]:
        """The widths before any round, in the form that those of a step have."""
        widths = {space.layer: space.width for space in self.spec.of(name)}
        return max(widths.values()) if isinstance(like, int) else {layer: widths[layer] for layer in like}

    def _middle(self, good: Widths, bad: Widths) -> dict:
        """Legal widths halfway, channels in multiples of `round_to`."""
        found: dict[str, int | Mapping[int, int]] = {}
        for name, low in bad.items():
            high = good[name]
            multiple = self.config.round_to if len(self.spec.of(name)[0].config) == 1 else 1
            if isinstance(low, int) and isinstance(high, int):
                found[name] = -(-(low + high) // (2 * multiple)) * multiple
            elif not isinstance(low, int):
                found[name] = {at: (width + _at(high, at)) // 2 for at, width in low.items()}
        return next_legal(self.model.config, self.spec, found)

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


def _at(width, layer: int) -> int:
    return width if isinstance(width, int) else width[layer]
