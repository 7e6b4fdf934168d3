"""Compare the answers of several models to the same questions."""

from __future__ import annotations

from collections import Counter
from math import comb, sqrt
from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor

from ..system.margins import MIN_RELATIVE_MARGIN, margin_of_error
from .figures import Answer, AnsweredQuestion, AnswersResult, Reading


SIGNIFICANCE = 0.05
# The quantile at the upper end of the intervals over questions, which are 95 % confidence intervals.
QUANTILE = 1 - SIGNIFICANCE / 2
# The smallest number of questions of a kind whose correct answers are shown by kind.
MIN_OF_KIND = 20
ALIKE, BETTER, WORSE = "alike", "better", "worse"
# The fields of an answer that are counted, with the words for such answers.
PROPERTIES = {"right": "correct", "loops": "repetitive", "stopped": "finished on their own"}


def mcnemar_p_value(last_only: int, first_only: int) -> float:
    """Return the p-value of McNemar's exact test (McNemar 1947, Psychometrika 12:153).

    Args:
        last_only: The number of questions for which only the answer of the last model has the property.
        first_only: The number of questions for which only the answer of the first model has the property.
    """
    discordant = last_only + first_only
    outcomes = sum(comb(discordant, count) for count in range(min(last_only, first_only) + 1))
    return min(1.0, 2 * outcomes / 2**discordant)


def paired(answers: AnswersResult, name: str) -> tuple[str, float]:
    """Compare the answers of the last model with the answers of the first model.

    Args:
        answers: The answers of at least two models.
        name: The property that is compared: `right`, `loops` or `stopped`.

    Returns:
        `alike`, `better` or `worse`, and the p-value. The models are alike if it is at least 0.05.
    """
    last_only = 0
    first_only = 0
    for question in answers.questions:
        last_only += getattr(question.last, name) > getattr(question.first, name)
        first_only += getattr(question.last, name) < getattr(question.first, name)
    p_value = mcnemar_p_value(last_only, first_only)

    if p_value >= SIGNIFICANCE:
        return ALIKE, p_value
    if (last_only > first_only) == (name != "loops"):
        return BETTER, p_value
    return WORSE, p_value


class Interval(NamedTuple):
    """A value and the ends of its 95 % confidence interval over questions."""

    value: float
    low: float
    high: float


def right_difference(answers: AnswersResult) -> Interval:
    """Return the share of correct answers of the last model minus the share of the first model.

    The interval is for paired shares (Newcombe 1998, Statistics in Medicine 17:2635, method 10): the Wilson intervals
    of both shares, combined by their correlation.

    Args:
        answers: The answers of at least two models.
    """
    counts = Counter((question.first.right, question.last.right) for question in answers.questions)
    both = counts[True, True]
    first_only = counts[True, False]
    last_only = counts[False, True]
    neither = counts[False, False]
    total = len(answers.questions)
    first = _wilson((both + first_only) / total, total)
    last = _wilson((both + last_only) / total, total)

    product = (both + first_only) * (last_only + neither) * (both + last_only) * (first_only + neither)
    correlation = 0.0
    if product:
        covariance = float(both * neither - first_only * last_only)
        if covariance > 0:
            covariance = max(covariance - total / 2, 0.0)
        correlation = covariance / sqrt(product)

    def distance(last_end: float, first_end: float) -> float:
        last_part = abs(last.value - last_end)
        first_part = abs(first.value - first_end)
        return sqrt(last_part**2 - 2 * correlation * last_part * first_part + first_part**2)

    difference = last.value - first.value
    return Interval(
        difference, difference - distance(last.low, first.high), difference + distance(last.high, first.low)
    )


def _wilson(share: float, total: int) -> Interval:
    """Return a share with its interval (Wilson 1927, JASA 22:209)."""
    z = NormalDist().inv_cdf(QUANTILE)
    center = (share + z**2 / (2 * total)) / (1 + z**2 / total)
    half = z * sqrt(share * (1 - share) / total + z**2 / (4 * total**2)) / (1 + z**2 / total)
    return Interval(share, center - half, center + half)


def right_of_original(answers: AnswersResult) -> Interval | None:
    """Return the correct answers of the last model divided by those of the first model; None if it has none."""
    original = answers.counts("right")[0] / len(answers.questions)
    if not original:
        return None
    return Interval(*(1 + end / original for end in right_difference(answers)))


class Followed(NamedTuple):
    """How a model predicts the original model's answers, each with its interval over questions.

    Attributes:
        agreement: The share of tokens of the answers that are the model's most likely next token.
        first: The mean number of tokens before the first that is not.
        log_probability: The difference of the log-probability to the original model, in nats per byte of the answers.
    """

    agreement: Interval
    first: Interval
    log_probability: Interval


def followed(answers: AnswersResult, model: str) -> Followed | None:
    """Return how a model predicts the original model's answers; None if it was not measured on two of them.

    Args:
        answers: The answers of the original model, which come first, and of the model.
        model: The name of the model.
    """
    pairs: list[tuple[Reading, Reading]] = []
    num_bytes = []
    for question in answers.questions:
        own = question.first.reading
        reading = question.answers[model].reading
        if own is not None and reading is not None:
            pairs.append((own, reading))
            num_bytes.append(len(question.first.text.encode()))
    if len(pairs) < 2:
        return None

    sizes = torch.tensor([[reading.tokens, reading.agreed, reading.first] for _, reading in pairs]).double()
    tokens, agreed, first = sizes.unbind(1)
    gains = torch.tensor([reading.log_probability - own.log_probability for own, reading in pairs]).double()
    lengths = torch.tensor(num_bytes).double()
    return Followed(_ratio(agreed, tokens), _ratio(first, torch.ones_like(first)), _ratio(gains, lengths))


def _ratio(values: Tensor, sizes: Tensor) -> Interval:
    """Return the sum of values divided by the sum of sizes, with the interval over the rows."""
    ratio = float(values.sum() / sizes.sum())
    residuals = (values - ratio * sizes) / sizes.mean()
    margin = max(margin_of_error(residuals, quantile=QUANTILE), MIN_RELATIVE_MARGIN * abs(ratio) / len(values))
    return Interval(ratio, ratio - margin, ratio + margin)


def is_compared(answers: AnswersResult | None) -> bool:
    """Return whether at least two models answered."""
    return answers is not None and len(answers.models) > 1


def answers_lines(answers: AnswersResult) -> list[str]:
    """Return the correct, repetitive and finished answers of all models, and how the last model follows the first."""
    parts = []
    for name, word in PROPERTIES.items():
        counts = " → ".join(map(str, answers.counts(name)))
        parts.append(f"{word} {counts}")
    if is_compared(answers):
        parts[0] += f" ({points(right_difference(answers))})"
    lines = [f"{len(answers.questions)} test questions: {', '.join(parts)}"]

    result = followed(answers, answers.models[-1]) if is_compared(answers) else None
    if result is not None:
        lines.append(
            f"Original model's answers: agreement {with_ends(result.agreement)}, first disagreement after "
            f"{with_ends(result.first, 1)} tokens, log-probability {with_ends(result.log_probability)} nats per byte"
        )
    return lines


def points(difference: Interval) -> str:
    """Return a difference of shares in words: `-5 points, 95%: -9 to -1`."""
    value, low, high = (f"{100 * end:+.0f}" for end in difference)
    return f"{value} points, {1 - SIGNIFICANCE:.0%}: {low} to {high}"


def with_ends(interval: Interval, digits: int = 3) -> str:
    """Return a value with half of the width of its interval: `0.871 ± 0.020`."""
    margin = (interval.high - interval.low) / 2
    return f"{interval.value:.{digits}f} ± {margin:.{digits}f}"


def right_by_kind(answers: AnswersResult, model: str) -> dict[str, tuple[int, int]]:
    """Return the correct answers and the number of questions of each kind that has at least 20 questions."""
    totals = Counter(question.kind for question in answers.questions)
    right = Counter(question.kind for question in answers.questions if question.answers[model].right)
    return {kind: (right[kind], total) for kind, total in totals.items() if total >= MIN_OF_KIND}


def answers_warning(answers: AnswersResult) -> list[str]:
    """Return a warning if the last model has significantly more wrong or repetitive answers than the first."""
    if not is_compared(answers):
        return []

    words = {"right": "wrong", "loops": "repetitive"}
    faults = [word for name, word in words.items() if paired(answers, name)[0] == WORSE]
    if not faults:
        return []
    return [f"warning: significantly more {' and '.join(faults)} answers than the original model"]


def outcome(answer: Answer) -> str:
    """Return the outcome of an answer in words: whether it is right, and its faults."""
    words = ["right" if answer.right else "wrong"]

    if answer.loops:
        words.append("repetitive")
    if not answer.stopped:
        words.append("cut off")
    return ", ".join(words)


def question_lines(question: AnsweredQuestion) -> str:
    """Return a question and the answer of each model as lines of text."""
    lines = [f"{question.kind}: {' '.join(question.prompt.split())}"]

    for name, answer in question.answers.items():
        if len(question.answers) == 1:
            name = "model"  # a model that is evaluated alone need not be pruned
        lines.append(f"  {name} ({outcome(answer)}): {' '.join(answer.text.split())}")
    return "\n".join(lines)


def sample_questions(answers: AnswersResult | None, count: int = 3) -> list[AnsweredQuestion]:
    """Return a few questions with different outcomes.

    The outcomes take turns: answers that became wrong, stayed right, stayed wrong, and became right.

    Args:
        answers: The answers; None where no questions were asked.
        count: The number of questions to return.
    """
    if answers is None:
        return []

    outcomes = ((True, False), (True, True), (False, False), (False, True))
    groups: dict[tuple[bool, bool], list[AnsweredQuestion]] = {pair: [] for pair in outcomes}
    for question in answers.questions:
        groups[question.first.right, question.last.right].append(question)

    questions = []
    for turn in range(len(answers.questions)):
        for group in groups.values():
            if turn < len(group):
                questions.append(group[turn])
    return questions[:count]
