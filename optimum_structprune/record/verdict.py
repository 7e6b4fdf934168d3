"""Judge a pruned model by its measured losses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import IntEnum
from math import inf
from statistics import fmean
from typing import TYPE_CHECKING

from ..config.pruning import LANGUAGES
from .answers import is_compared
from .figures import (
    AnswersResult,
    DomainResult,
    Figure,
    LanguageResult,
    UnseenResult,
    known_languages,
    mean_ratio,
    ratios_of,
    with_technical_margin,
)
from .table import times


if TYPE_CHECKING:
    from .report import Report


class Level(IntEnum):
    """The levels of a verdict, from the best to the worst."""

    READY = 0
    TEST_FIRST = 1
    OWN_DOMAINS = 2
    RECOVER = 3
    UNUSABLE = 4


@dataclass(frozen=True)
class Limits:
    """The limits of a level.

    Attributes:
        mean: The highest geometric mean of the perplexity ratios of the calibration domains.
        worst: The highest perplexity ratio of a calibration domain.
        unseen: The highest perplexity ratio on unseen text.
        kept_answers: The lowest share of the original model's correct answers that are still correct.
        new_loops: The highest share of questions whose answers become repetitive.
    """

    mean: float
    worst: float
    unseen: float
    kept_answers: float
    new_loops: float


# The figures in docs/how_much.md support these limits: two models, with and without their answers.
LIMITS = {
    Level.READY: Limits(mean=1.05, worst=1.05, unseen=1.05, kept_answers=0.9, new_loops=1 / 16),
    Level.TEST_FIRST: Limits(mean=1.2, worst=1.3, unseen=1.2, kept_answers=0.85, new_loops=1 / 8),
    Level.OWN_DOMAINS: Limits(mean=1.2, worst=1.3, unseen=inf, kept_answers=0.85, new_loops=1 / 8),
    Level.RECOVER: Limits(mean=1.6, worst=2.0, unseen=inf, kept_answers=0.4, new_loops=1 / 4),
}
# The limits for encoders: the lowest share of the 10 nearest neighbours that both models have in common, as the mean
# over the domains and on the worst domain.
NEIGHBOUR_LIMITS = {Level.READY: (0.95, 0.93), Level.TEST_FIRST: (0.75, 0.7), Level.RECOVER: (0.6, 0.5)}
# A language got worse if it takes this many times the bits or tokens.
LANGUAGE_LIMIT = 1.02
MAX_NAMED_LANGUAGES = 3

ADVICE = {
    Level.READY: "ready to use",
    Level.TEST_FIRST: "usable on your calibration domains; test it on your own text",
    Level.OWN_DOMAINS: "usable on your calibration domains, but not on other text",
    Level.RECOVER: "needs recovery before use",
    Level.UNUSABLE: "not usable as is; prune less, or use it to initialize a long distillation run",
}
LONGER = "needs a longer recovery before use"
UNASKED = "answers were not checked"


@dataclass(frozen=True)
class Verdict:
    """The verdict on a model.

    Attributes:
        level: The level.
        advice: The level in words.
        reasons: The figures that rule out the next better level.
        worse_languages: The names of languages that got worse.
        unsupported_languages: The names of requested languages that the original model does not support.
        has_answers: Whether test questions were asked.
    """

    level: Level
    advice: str
    reasons: list[str] = field(default_factory=list)
    worse_languages: list[str] = field(default_factory=list)
    unsupported_languages: list[str] = field(default_factory=list)
    has_answers: bool = True

    def __str__(self) -> str:
        """Return the verdict as one sentence."""
        parts = [self.advice]
        if self.reasons:
            parts[0] += f" ({', '.join(self.reasons)})"

        if self.worse_languages:
            parts.append(f"{_some(self.worse_languages)} got worse")
        if self.unsupported_languages:
            parts.append(f"the original model does not support {_some(self.unsupported_languages)}")
        if not self.has_answers:
            parts.append(UNASKED)
        return "; ".join(parts)


@dataclass(frozen=True)
class Evidence:
    """The figures that a verdict depends on.

    Attributes:
        ratios: The perplexities by calibration domain.
        unseen: The perplexity on unseen text; None where it was not measured.
        answers: The answers of the original and the last model; None where only one of them was asked.
        is_simple_text: Whether the unseen text is built-in. It is simpler than other text, so models lose less on it.
        is_recovered: Whether a training changed the model.
    """

    ratios: dict[str, Figure]
    unseen: Figure | None = None
    answers: AnswersResult | None = None
    is_simple_text: bool = False
    is_recovered: bool = False

    @classmethod
    def of(cls, report: Report, answers: AnswersResult | None = None) -> Evidence:
        """Return the latest figures of a report.

        Args:
            report: The report of a pruning, with the training after it.
            answers: Answers that were collected later.
        """
        recovery = report.recovery
        unseen = judged_unseen(report)
        latest_answers = answers or report.latest_answers
        return cls(
            ratios=ratios_of(judged_domains(report)),
            unseen=None if unseen is None else unseen.perplexity,
            answers=latest_answers if is_compared(latest_answers) else None,
            is_simple_text=report.unseen is not None and report.unseen.source == "built-in",
            is_recovered=recovery is not None and bool(recovery.kept_step),
        )

    @property
    def worst_domain(self) -> str:
        """Return the name of the domain with the largest ratio."""
        return max(self.ratios, key=lambda name: self.ratios[name].ratio or 0.0)

    @property
    def worst(self) -> float:
        """Return the largest perplexity ratio."""
        return self.worst_figure.ratio or 0.0

    @property
    def worst_figure(self) -> Figure:
        """Return the perplexity of the domain with the largest ratio."""
        return self.ratios[self.worst_domain]

    @property
    def kept_answers(self) -> tuple[int, int]:
        """Return how many of the original model's correct answers are still correct, and how many there were."""
        if self.answers is None:
            return 0, 0
        correct = [question for question in self.answers.questions if question.first.right]
        return sum(question.last.right for question in correct), len(correct)

    @property
    def new_loops(self) -> int:
        """Return the increase in the number of repetitive answers."""
        if self.answers is None:
            return 0
        counts = self.answers.counts("loops")
        return counts[-1] - counts[0]

    def violations(self, limits: Limits) -> list[str]:
        """Return the figures that exceed limits, in words."""
        violations = []
        mean, margin = mean_ratio(self.ratios.values())

        if mean > limits.mean:
            violations.append(f"{times(mean, margin)} on the calibration domains")
        # The ratio of a single domain is the mean too.
        if len(self.ratios) > 1 and self.worst > limits.worst:
            violations.append(f"{times(self.worst, self.worst_figure.margin)} on {self.worst_domain}")

        if self.unseen is None:
            if mean > limits.unseen:
                violations.append("unseen text was not measured")
        elif (self.unseen.ratio or 0.0) > limits.unseen:
            violations.append(f"{times(self.unseen.ratio or 0.0, self.unseen.margin)} on unseen text")

        violations += self._violations_in_answers(limits)
        return violations

    def _violations_in_answers(self, limits: Limits) -> list[str]:
        """Return the figures of the answers that exceed limits, in words."""
        if self.answers is None:
            return []
        violations = []

        num_kept, num_correct = self.kept_answers
        if num_kept < limits.kept_answers * num_correct:
            violations.append(f"{num_kept} of {num_correct} correct answers kept")
        if self.new_loops > limits.new_loops * len(self.answers.questions):
            violations.append(f"{self.new_loops} more repetitive answers")
        return violations


def judge(report: Report, answers: AnswersResult | None = None) -> Verdict | None:
    """Return the verdict on the model of a report, or None where no loss was measured.

    The point estimates decide, not the ends of the confidence intervals. For encoders the lower ends decide.

    Args:
        report: The report of a pruning, with the training after it.
        answers: Answers that were collected later; by default those in the report.
    """
    if any(domain.vectors is not None for domain in report.domains.values()):
        return _judge_vectors(report)

    evidence = Evidence.of(report, answers)
    if not evidence.ratios or not report.dense.parameters:
        return None

    # Nothing justifies the best level without answers, or with simple text alone.
    can_be_ready = evidence.answers is not None and not evidence.is_simple_text
    reasons: list[str] = []
    level = Level.UNUSABLE

    for candidate, limits in LIMITS.items():
        violations = evidence.violations(limits)
        if not violations and (can_be_ready or candidate is not Level.READY):
            level = candidate
            break
        reasons = violations

    advice = ADVICE[level]
    if level is Level.RECOVER and evidence.is_recovered:
        advice = LONGER

    worse, unsupported = _languages(report)
    return Verdict(level, advice, reasons, worse, unsupported, has_answers=evidence.answers is not None)


def judged_domains(report: Report) -> Mapping[str, DomainResult]:
    """Return the results by domain that the verdict is based on.

    These are the results after training, if the original model was measured there.
    """
    if report.recovery is not None and report.recovery.has_dense:
        return report.recovery.domains
    return report.domains


def judged_unseen(report: Report) -> UnseenResult | None:
    """Return the latest result on unseen text.

    After vocabulary trimming its interval includes the loss that technical text may have.
    """
    unseen = report.unseen
    split_words = None if unseen is None else unseen.split_words
    recovery = report.recovery
    if recovery is not None and recovery.unseen is not None and recovery.unseen.perplexity is not None:
        unseen = recovery.unseen

    if unseen is None or unseen.perplexity is None:
        return unseen
    perplexity = with_technical_margin(unseen.perplexity, split_words)
    return replace(unseen, perplexity=perplexity, split_words=split_words)


def _judge_vectors(report: Report) -> Verdict | None:
    """Return the verdict on an encoder by its vectors and by its loss, if it has one."""
    shares = _neighbour_shares(report)
    if shares is None:
        return None

    mean_share = fmean(shares.values())
    worst_domain = min(shares, key=lambda name: shares[name])
    worst_share = shares[worst_domain]

    ratios = ratios_of(report.domains)
    mean_loss = 1.0
    if ratios:
        mean_loss, _ = mean_ratio(ratios.values())
    worst_loss = max((figure.ratio or 1.0 for figure in ratios.values()), default=1.0)

    level = Level.UNUSABLE
    for candidate, (min_mean, min_worst) in NEIGHBOUR_LIMITS.items():
        limits = LIMITS[candidate]
        keeps_neighbours = mean_share >= min_mean and worst_share >= min_worst
        if keeps_neighbours and mean_loss <= limits.mean and worst_loss <= limits.worst:
            level = candidate
            break

    reasons = []
    if level is not Level.READY:
        reasons.append(f"at least {mean_share:.0%} of the neighbours kept")
        reasons.append(f"{worst_share:.0%} on {worst_domain}")

    worse, unsupported = _languages(report)
    return Verdict(level, ADVICE[level], reasons, worse, unsupported)


def _neighbour_shares(report: Report) -> dict[str, float] | None:
    """Return the lower end of the share of common neighbours by domain, or None if a domain has no share."""
    shares = {}
    for name, domain in report.domains.items():
        neighbours = None if domain.vectors is None else domain.vectors.neighbours
        if neighbours is None or neighbours.pruned is None:
            return None
        shares[name] = neighbours.pruned - (neighbours.margin or 0.0)
    return shares


def _languages(report: Report) -> tuple[list[str], list[str]]:
    """Return the names of the languages that got worse, and of the requested ones without support in the original.

    A language got worse if it loses more than the worst calibration domain. If the config names languages, only these
    are judged.
    """
    languages: Mapping[str, LanguageResult] = report.languages
    requested = [code for code, result in languages.items() if result.wanted]
    judged = requested or list(languages)

    limit = LANGUAGE_LIMIT
    if report.recovery is None:
        limit = max(limit, _worst_bits_ratio(report.domains))

    worse = []
    for code, result in known_languages(languages).items():
        if code in judged and result.is_worse(limit):
            worse.append(LANGUAGES[code])

    unsupported = [LANGUAGES[code] for code in requested if not languages[code].is_known]
    return worse, unsupported


def _worst_bits_ratio(domains: Mapping[str, DomainResult]) -> float:
    """Return the largest ratio of the bits per byte of the calibration domains, or 0 without any."""
    figures = [domain.bits_per_byte for domain in domains.values()]
    ratios = [figure.ratio for figure in figures if figure is not None]
    return max((ratio for ratio in ratios if ratio is not None), default=0.0)


def _some(names: list[str]) -> str:
    """Return a list of names in words; many are cut."""
    text = ", ".join(names[:MAX_NAMED_LANGUAGES])
    num_others = len(names) - MAX_NAMED_LANGUAGES
    if num_others > 0:
        text += f" and {num_others} more"
    return text
