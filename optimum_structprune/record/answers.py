"""Compare the answers of several models to the same questions."""

from __future__ import annotations

from dataclasses import dataclass
from math import comb

import torch

from ..margins import margin_of_share
from .figures import Answer, AnsweredQuestion, AnswersResult


SIGNIFICANCE = 0.05
ALIKE, BETTER, WORSE = "alike", "better", "worse"
# The fields of an answer that are counted, with the words for such answers.
FIGURES = {"right": "correct", "loops": "repetitive", "stopped": "finished on their own"}


@dataclass(frozen=True)
class PairedComparison:
    """The difference between the answers of the last and the first model to the same questions.

    Attributes:
        difference: The mean difference.
        margin: Half the width of its 90% confidence interval.
        questions: The number of questions.
        last_only: The number of questions for which only the answer of the last model has the property.
        first_only: The number of questions for which only the answer of the first model has the property.
        p_value: The probability of such a difference if both models are equally good (McNemar's exact test).
        verdict: `alike`, `better` or `worse`; `alike` if the probability is at least 0.05.
    """

    difference: float
    margin: float
    questions: int
    last_only: int
    first_only: int
    p_value: float
    verdict: str


def mcnemar_p_value(last_only: int, first_only: int) -> float:
    """Return the p-value of McNemar's exact test (McNemar 1947, Psychometrika 12:153).

    Args:
        last_only: The number of questions for which only the answer of the last model has the property.
        first_only: The number of questions for which only the answer of the first model has the property.
    """
    discordant = last_only + first_only
    outcomes = sum(comb(discordant, count) for count in range(min(last_only, first_only) + 1))
    return min(1.0, 2 * outcomes / 2**discordant)


def paired(answers: AnswersResult, name: str) -> PairedComparison:
    """Compare the answers of the last model with the answers of the first model.

    Args:
        answers: The answers of at least two models.
        name: The property that is compared: `right`, `loops` or `stopped`.
    """
    differences = torch.tensor(
        [float(getattr(question.last, name)) - float(getattr(question.first, name)) for question in answers.questions],
        dtype=torch.float64,
    )
    last_only = int((differences > 0).sum())
    first_only = int((differences < 0).sum())
    p_value = mcnemar_p_value(last_only, first_only)

    higher_is_better = name != "loops"
    if p_value >= SIGNIFICANCE:
        verdict = ALIKE
    elif (last_only > first_only) == higher_is_better:
        verdict = BETTER
    else:
        verdict = WORSE

    return PairedComparison(
        difference=float(differences.mean()),
        margin=margin_of_share(differences),
        questions=len(differences),
        last_only=last_only,
        first_only=first_only,
        p_value=p_value,
        verdict=verdict,
    )


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

    faults = []
    if paired(answers, "right").verdict == WORSE:
        faults.append("wrong")
    if paired(answers, "loops").verdict == WORSE:
        faults.append("repetitive")

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
