"""Judge a pruned model by its measured losses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from math import inf
from statistics import fmean, geometric_mean

from ..config.domains import BUILT_IN
from ..config.pruning import LANGUAGES
from .answers import followed, is_compared, right_of_original, with_ends
from .figures import (
    AnswersResult,
    LanguageResult,
    Measurements,
    TextResult,
    mean_ratio,
    ratios_of,
    worse_languages,
)
from .report import Report
from .table import ratio_text, times


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
        right: The lowest lower end of the interval of the correct answers, relative to the original model's number.
        agreement: The lowest lower end of the interval of the agreement with the original model's answers.
        new_loops: The highest share of questions whose answers become repetitive.
    """

    mean: float
    worst: float
    unseen: float
    right: float
    agreement: float
    new_loops: float


# The figures in docs/how_much.md and docs/decisions/judge.md support these limits.
LIMITS = {
    Level.READY: Limits(mean=1.05, worst=1.05, unseen=1.05, right=0.88, agreement=0.93, new_loops=1 / 16),
    Level.TEST_FIRST: Limits(mean=1.2, worst=1.3, unseen=1.2, right=0.7, agreement=0.8, new_loops=1 / 8),
    Level.OWN_DOMAINS: Limits(mean=1.2, worst=1.3, unseen=inf, right=0.7, agreement=0.8, new_loops=1 / 8),
    Level.RECOVER: Limits(mean=1.6, worst=2.0, unseen=inf, right=0.35, agreement=0.6, new_loops=1 / 4),
}
# The limits for encoders, which docs/decisions/encoder_judge.md supports: the lowest share of the 10 nearest
# neighbours that both models have in common, as the mean over the domains and on the worst domain, and the lowest
# retrieval relative to the original model's.
NEIGHBOUR_LIMITS = {Level.READY: (0.8, 0.75), Level.TEST_FIRST: (0.65, 0.55), Level.RECOVER: (0.5, 0.4)}
RETRIEVAL_LIMITS = {Level.READY: 0.98, Level.TEST_FIRST: 0.95, Level.RECOVER: 0.85}
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
        missed: The requested speed-up that the model misses, in words.
    """

    level: Level
    advice: str
    reasons: list[str] = field(default_factory=list)
    worse_languages: list[str] = field(default_factory=list)
    unsupported_languages: list[str] = field(default_factory=list)
    has_answers: bool = True
    missed: str = ""

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
        if self.missed:
            parts.append(self.missed)
        return "; ".join(parts)


def judge(report: Report, answers: AnswersResult | None = None) -> Verdict | None:
    """Return the verdict on the model of a report, or None where no loss was measured.

    The point estimates of losses decide, and the lower ends of the intervals of answers and of neighbours.
    A loss of retrieval counts if it is outside its interval, which is wide.

    Args:
        report: The report of a pruning, with the training after it.
        answers: Answers that were collected later; by default those in the report.
    """
    table = report.latest(answers)
    has_answers = is_compared(table.answers)
    can_be_ready = True
    if table.has_vectors:
        if any(_neighbours(domain) is None for domain in table.domains.values()):
            return None
        levels = list(NEIGHBOUR_LIMITS)
        violations_of = _vector_violations
        has_answers = True
    elif ratios_of(table.domains) and report.original.parameters:
        levels = list(LIMITS)
        violations_of = _loss_violations
        # Nothing justifies the best level without answers, or with simple text alone.
        is_simple_text = table.unseen is not None and table.unseen.source == BUILT_IN
        can_be_ready = has_answers and not is_simple_text
    else:
        return None

    reasons: list[str] = []
    level = Level.UNUSABLE
    for candidate in levels:
        violations = violations_of(table, candidate)
        if not violations and (candidate is not Level.READY or can_be_ready):
            level = candidate
            break
        reasons = violations

    advice = ADVICE[level]
    if level is Level.RECOVER and report.recovery is not None and report.recovery.kept_step:
        advice = LONGER

    missed = ""
    if report.speed is not None and not report.speed.is_met:
        missed = f"{report.speed.measured:.2f}× as fast, and {report.speed.wish:.2f}× was requested"

    worse, unsupported = _languages(report)
    return Verdict(level, advice, reasons, worse, unsupported, has_answers, missed)


def _loss_violations(table: Measurements, level: Level) -> list[str]:
    """Return the losses and the figures of the answers that exceed the limits of a level, in words."""
    limits = LIMITS[level]
    ratios = ratios_of(table.domains)
    mean, margin = mean_ratio(ratios.values())
    worst_domain, worst = max(ratios.items(), key=lambda item: item[1].ratio or 0.0)

    violations = []
    if mean > limits.mean:
        violations.append(f"{times(mean, margin)} on the calibration domains")
    # The ratio of a single domain is the mean too.
    if len(ratios) > 1 and (worst.ratio or 0.0) > limits.worst:
        violations.append(f"{ratio_text(worst)} on {worst_domain}")

    unseen = table.unseen_perplexity
    if unseen is None:
        if mean > limits.unseen:
            violations.append("unseen text was not measured")
    elif (unseen.ratio or 0.0) > limits.unseen:
        violations.append(f"{ratio_text(unseen)} on unseen text")

    answers = table.answers
    if answers is None or not is_compared(answers):
        return violations

    right = right_of_original(answers)
    if right is not None and right.low < limits.right:
        first, *_, last = answers.counts("right")
        violations.append(f"correct answers {first} → {last} of {len(answers.questions)}, at least {right.low:.0%}")

    result = followed(answers, answers.models[-1])
    if result is not None and result.agreement.low < limits.agreement:
        violations.append(f"agreement {with_ends(result.agreement)} with the original model's answers")

    counts = answers.counts("loops")
    new_loops = counts[-1] - counts[0]
    if new_loops > limits.new_loops * len(answers.questions):
        violations.append(f"{new_loops} more repetitive answers")
    return violations


def _vector_violations(table: Measurements, level: Level) -> list[str]:
    """Return the figures of an encoder that exceed the limits of a level, in words."""
    violations = []
    shares = {name: _neighbours(domain) or 0.0 for name, domain in table.domains.items()}
    mean = fmean(shares.values())
    worst_domain, worst = min(shares.items(), key=lambda item: item[1])
    min_mean, min_worst = NEIGHBOUR_LIMITS[level]
    if mean < min_mean or worst < min_worst:
        violations += [f"at least {mean:.0%} of the neighbours kept", f"{worst:.0%} on {worst_domain}"]

    retrievals = [domain.retrieval for domain in table.domains.values() if domain.retrieval is not None]
    if retrievals:
        ratio, margin = mean_ratio(retrievals)
        if ratio + (margin or 0.0) < RETRIEVAL_LIMITS[level]:
            violations.append(f"{times(ratio, margin)} of the retrieval")

    losses = [figure.ratio or 1.0 for figure in ratios_of(table.domains).values()]
    if losses:
        mean_loss = geometric_mean(losses) if max(losses) < inf else inf
        limits = LIMITS[level]
        if mean_loss > limits.mean or max(losses) > limits.worst:
            violations.append(f"{times(mean_loss)} on missing text")
    return violations


def _neighbours(domain: TextResult) -> float | None:
    """Return the lower end of the share of common neighbours, or None if it was not measured."""
    figure = domain.neighbours
    if figure is None or figure.last is None:
        return None
    return figure.last - (figure.margin or 0.0)


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
        figures = [domain.bits_per_byte for domain in report.domains.values()]
        ratios = [figure.ratio or 0.0 for figure in figures if figure is not None]
        limit = max(limit, max(ratios, default=0.0))

    worse = [LANGUAGES[code] for code in worse_languages(languages, limit) if code in judged]
    unsupported = [LANGUAGES[code] for code in requested if languages[code].known is False]
    return worse, unsupported


def _some(names: list[str]) -> str:
    """Return a list of names in words; many are cut."""
    text = ", ".join(names[:MAX_NAMED_LANGUAGES])
    num_others = len(names) - MAX_NAMED_LANGUAGES
    if num_others > 0:
        text += f" and {num_others} more"
    return text
