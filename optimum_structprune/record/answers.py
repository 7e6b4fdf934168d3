"""Compare the answers of several models to the same questions."""

from __future__ import annotations

from math import comb

from .figures import Answer, AnsweredQuestion, AnswersResult


SIGNIFICANCE = 0.05
ALIKE, BETTER, WORSE = "alike", "better", "worse"
# The fields of an answer that are counted, with the words for such answers.
COUNTED = {"right": "correct", "loops": "repetitive", "stopped": "finished on their own"}


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


def is_compared(answers: AnswersResult | None) -> bool:
    """Return whether at least two models answered."""
    return answers is not None and len(answers.models) > 1


def answers_line(answers: AnswersResult) -> str:
    """Return the answers in one line: `16 test questions: correct 16 → 10, repetitive 0 → 4, …`."""
    parts = []
    for name, word in COUNTED.items():
        counts = " → ".join(map(str, answers.counts(name)))
        parts.append(f"{word} {counts}")
    return f"{len(answers.questions)} test questions: {', '.join(parts)}"


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
