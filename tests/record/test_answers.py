"""The comparison of two models on the same questions, and the lines about it."""

from math import comb
from random import Random

import pytest
from results import question

from optimum_structprune.record.answers import (
    answers_lines,
    answers_warning,
    followed,
    mcnemar_p_value,
    outcome,
    paired,
    question_lines,
    right_by_kind,
    right_difference,
    sample_questions,
)
from optimum_structprune.record.figures import Answer, AnsweredQuestion, AnswersResult, Reading


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


@pytest.mark.parametrize(("both", "first_only", "last_only", "neither", "low", "high"), [
    # Newcombe 1998, Statistics in Medicine 17:2635, table III, method 10.
    (36, 12, 2, 0, 0.0569, 0.3404), (20, 12, 2, 16, 0.0562, 0.3292), (18, 12, 2, 18, 0.0562, 0.3290),
    (30, 0, 0, 0, -0.1135, 0.1135),
])  # fmt: skip
def test_the_interval_of_a_paired_difference_equals_published_ones(both, first_only, last_only, neither, low, high):
    questions = [paired_question(True, True)] * both + [paired_question(True, False)] * first_only
    questions += [paired_question(False, True)] * last_only + [paired_question(False, False)] * neither

    difference = right_difference(AnswersResult(questions))

    # The paper has the first share minus the second.
    assert -difference.high == pytest.approx(low, abs=5e-4)
    assert -difference.low == pytest.approx(high, abs=5e-4)


def test_the_interval_of_a_paired_difference_covers_it():
    """Of 300 samples of 64 questions, about 95 % have an interval that covers the difference of all questions."""
    generator = Random(0)
    shares = {(True, True): 0.5, (True, False): 0.12, (False, True): 0.05, (False, False): 0.33}
    covered = 0
    for _ in range(300):
        pairs = generator.choices(list(shares), list(shares.values()), k=64)
        low, high = right_difference(AnswersResult([paired_question(*pair) for pair in pairs]))[1:]
        covered += low <= 0.05 - 0.12 <= high
    assert covered >= 0.92 * 300


def read_question(tokens, agreed, first, log_probability, text="four"):
    """Return a question whose answer the original model and another model have read."""
    own = Reading(tokens, tokens, tokens, -1.0)
    reading = Reading(tokens, agreed, first, log_probability)
    return AnsweredQuestion(
        "facts",
        "?",
        {
            "original": Answer(text, True, False, True, tokens, own),
            "pruned": Answer("", True, False, True, 0, reading),
        },
    )


def test_figures_of_reading_are_means_over_tokens_questions_and_bytes():
    result = AnswersResult(
        [
            read_question(10, 9, 4, -3.0),
            read_question(30, 15, 0, -5.0, text="twelve bytes"),
            question({"original": True, "pruned": True}),
        ]
    )

    agreement, first, log_probability = followed(result, "pruned")

    assert agreement.value == pytest.approx(24 / 40)
    assert first.value == pytest.approx(2)
    assert log_probability.value == pytest.approx(-6 / 16)
    for interval in (agreement, first, log_probability):
        assert interval.low < interval.value < interval.high
    assert followed(AnswersResult([read_question(10, 9, 4, -3.0)]), "pruned") is None
    assert "agreement 0.600 ± " in answers_lines(result)[1]


def test_an_interval_of_equal_answers_is_not_empty():
    agreement = followed(AnswersResult([read_question(10, 10, 10, -1.0)] * 32), "pruned").agreement
    assert agreement.low < agreement.value == 1.0


def test_correct_answers_are_shown_by_kind_from_twenty_questions_on():
    few = AnswersResult([paired_question(True, False)] * 19)
    many = AnswersResult([paired_question(True, False)] * 20)
    assert right_by_kind(few, "original") == {}
    assert right_by_kind(many, "original") == {"facts": (20, 20)}
    assert right_by_kind(many, "pruned") == {"facts": (0, 20)}


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


def test_answers_are_summarized():
    answers = AnswersResult([paired_question(True, False)] * 5 + [paired_question(True, True)])

    assert answers_lines(answers) == [
        "6 test questions: correct 6 → 1 (-83 points, 95%: -97 to -28), repetitive 0 → 0, finished on their own 6 → 6"
    ]


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
