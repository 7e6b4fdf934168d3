"""The comparison of two models on the same questions, and the lines about it."""

from math import comb

import pytest
from results import question

from optimum_structprune.record.answers import (
    answers_line,
    answers_warning,
    mcnemar_p_value,
    outcome,
    paired,
    question_lines,
    sample_questions,
)
from optimum_structprune.record.figures import Answer, AnswersResult


def paired_question(original, pruned, prompt="?", loops=()):
    """Return a question with an answer of each of two models, right or wrong."""
    return question({"original": original, "pruned": pruned}, loops, prompt)


@pytest.mark.parametrize(("wins", "losses", "verdict"), [
    (0, 0, "alike"), (3, 3, "alike"), (1, 4, "alike"), (1, 12, "worse"), (12, 1, "better"),
])  # fmt: skip
def test_the_test_of_mcnemar_equals_its_definition(wins, losses, verdict):
    questions = [paired_question(False, True)] * wins
    questions += [paired_question(True, False)] * losses
    questions += [paired_question(True, True)] * 5

    measured_verdict, p_value = paired(AnswersResult(questions), "right")

    discordant = wins + losses
    tail = sum(comb(discordant, count) for count in range(min(wins, losses) + 1)) / 2**discordant
    assert p_value == pytest.approx(min(1, 2 * tail))
    assert p_value == mcnemar_p_value(wins, losses)
    assert (p_value >= 0.05) == (verdict == "alike")
    assert measured_verdict == verdict


def test_more_repetitive_answers_are_worse():
    repetitive_pruned = AnswersResult([paired_question(True, True, loops=["pruned"])] * 9)
    repetitive_original = AnswersResult([paired_question(True, True, loops=["original"])] * 9)

    assert paired(repetitive_pruned, "loops")[0] == "worse"
    assert paired(repetitive_original, "loops")[0] == "better"


def test_sample_questions_show_all_outcomes():
    questions = [
        paired_question(True, True, "kept"),
        paired_question(True, True, "kept too"),
        paired_question(True, False, "lost"),
        paired_question(False, False, "never"),
    ]
    answers = AnswersResult(questions)

    assert [item.prompt for item in sample_questions(answers)] == ["lost", "kept", "never"]
    assert len(sample_questions(answers, 9)) == 4
    assert sample_questions(None) == []


def test_answers_are_summarized_in_one_line():
    answers = AnswersResult([paired_question(True, False)] * 5 + [paired_question(True, True)])

    assert answers_line(answers) == "6 test questions: correct 6 → 1, repetitive 0 → 0, finished on their own 6 → 6"


def test_only_a_significant_loss_of_correct_answers_causes_a_warning():
    assert answers_warning(AnswersResult([paired_question(True, False)] * 5 + [paired_question(True, True)])) == []
    assert answers_warning(AnswersResult([paired_question(False, True)] * 9)) == []

    (warning,) = answers_warning(AnswersResult([paired_question(True, False)] * 6))
    assert warning == "warning: significantly more wrong answers than the original model"
    (warning,) = answers_warning(AnswersResult([paired_question(True, False, loops=["pruned"])] * 6))
    assert "more wrong and repetitive answers" in warning


def test_an_outcome_names_all_faults_of_an_answer():
    assert outcome(Answer("", right=False, loops=True, stopped=False)) == "wrong, repetitive, cut off"


def test_a_model_that_is_evaluated_alone_is_not_called_pruned():
    alone = question({"pruned": True}, (), "Why?")
    assert "  model (right" in question_lines(alone)
    assert "  pruned (wrong" in question_lines(paired_question(True, False))
