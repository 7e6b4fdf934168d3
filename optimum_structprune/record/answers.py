"""Comparison of the answers of several models to the same questions."""

from __future__ import annotations

from dataclasses import dataclass
from math import comb

import torch

from ..forward.metrics import margin_of_share
from .figures import Answer, AnsweredQuestion, AnswersResult


SIGNIFICANCE = 0.05
ALIKE, BETTER, WORSE = "alike", "better", "worse"
# The figures of an answer, with the words for answers to which they apply.
FIGURES = {"right": "correct", "loops": "repetitive", "stopped": "finished on their own"}


@dataclass(frozen=True)
class PairedComparison:
    """How a figure of the last model differs from the first model on the same questions.

    Attributes:
        difference: The mean difference.
        margin: Half the width of its 90% confidence interval.
        questions: The number of questions.
        more: The number of questions for which the figure holds of the last model alone.
        fewer: The number of questions for which the figure holds of the first model alone.
        p_value: The probability of such a difference between models that are alike (McNemar's exact test).
        verdict: `alike`, `better` or `worse`; `alike` where the probability is at least 0.05.
    """

    difference: float
    margin: float
    questions: int
    more: int
    fewer: int
    p_value: float
    verdict: str


def mcnemar_p_value(more: int, fewer: int) -> float:
    """Return the p-value of McNemar's exact test (McNemar 1947, Psychometrika 12:153).

    Args:
        more: The number of questions that only one model has right.
        fewer: The number of questions that only the other model has right.
    """
    discordant = more + fewer
    tail = sum(comb(discordant, wins) for wins in range(min(more, fewer) + 1)) / 2**discordant
    return min(1.0, 2 * tail)


def paired(answers: AnswersResult, name: str) -> PairedComparison:
    """Compare a figure (`right`, `loops` or `stopped`) of the last model with the first model."""
    differences = torch.tensor(
        [float(getattr(item.last, name)) - float(getattr(item.first, name)) for item in answers.questions],
        dtype=torch.float64,
    )
    more = int((differences > 0).sum())
    fewer = int((differences < 0).sum())
    p_value = mcnemar_p_value(more, fewer)

    higher_is_better = name != "loops"
    if p_value >= SIGNIFICANCE:
        verdict = ALIKE
    elif (more > fewer) == higher_is_better:
        verdict = BETTER
    else:
        verdict = WORSE

    margin = margin_of_share(differences)
    return PairedComparison(float(differences.mean()), margin, len(differences), more, fewer, p_value, verdict)


def is_compared(answers: AnswersResult | None) -> bool:
    """Return whether at least two models answered."""
    return answers is not None and len(answers.models) > 1


def answers_line(answers: AnswersResult) -> str:
    """Return the answers in one line: `16 test questions: correct 16 → 10, repetitive 0 → 4, …`."""
    parts = []
    for name, word in FIGURES.items():
        counts = " → ".join(map(str, answers.counts(name)))
        parts.append(f"{word} {counts}")
    return f"{len(answers.questions)} test questions: {', '.join(parts)}"


def answers_warning(answers: AnswersResult) -> list[str]:
    """Return a warning if the last model has significantly more wrong or repetitive answers than the first."""
    if not is_compared(answers):
        return []

    troubles = []
    if paired(answers, "right").verdict == WORSE:
        troubles.append("wrong")
    if paired(answers, "loops").verdict == WORSE:
        troubles.append("repetitive")
    if not troubles:
        return []
    return [f"warning: significantly more {' and '.join(troubles)} answers than the original model"]


def outcome(answer: Answer) -> str:
    """Return whether an answer is right, and its other faults."""
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
        lines.append(f"  {name} ({outcome(answer)}): {' '.join(answer.text.split())}")
    return "\n".join(lines)


def sample_questions(answers: AnswersResult | None, count: int = 3) -> list[AnsweredQuestion]:
    """Return a few questions with different outcomes.

    They take turns: answers that became wrong, stayed right, stayed wrong, and became right.
    """
    if answers is None:
        return []

    outcomes = ((True, False), (True, True), (False, False), (False, True))
    groups: dict[tuple[bool, bool], list[AnsweredQuestion]] = {pair: [] for pair in outcomes}
    for question in answers.questions:
        groups[question.first.right, question.last.right].append(question)

    longest = max(map(len, groups.values()))
    in_turn = [group[turn] for turn in range(longest) for group in groups.values() if turn < len(group)]
    return in_turn[:count]
