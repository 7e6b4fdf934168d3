"""Whether two models differ on the same questions, and the lines about it."""

from math import comb

import pytest
from results import question

from optimum_structprune.record.answers import (
    answers_line,
    answers_warning,
    mcnemar_p_value,
    outcome,
    paired,
    sample_questions,
)
from optimum_structprune.record.figures import Answer, AnswersResult


def both(dense, pruned, prompt="?", loops=()):
    return question({"dense": dense, "pruned": pruned}, loops, prompt)


@pytest.mark.parametrize(("more", "fewer"), [(0, 0), (3, 3), (1, 4), (1, 12), (12, 1)])
def test_the_test_of_mcnemar_is_its_definition(more, fewer):
    questions = [both(False, True)] * more + [both(True, False)] * fewer + [both(True, True)] * 5
    comparison = paired(AnswersResult(questions), "right")
    discordant = more + fewer
    tail = sum(comb(discordant, wins) for wins in range(min(more, fewer) + 1)) / 2**discordant
    assert comparison.p_value == pytest.approx(min(1, 2 * tail)) == mcnemar_p_value(more, fewer)
    assert (comparison.last_only, comparison.first_only) == (more, fewer)
    assert comparison.difference == pytest.approx((more - fewer) / len(questions))
    expected = "better" if more > fewer else "worse"
    assert comparison.verdict == ("alike" if comparison.p_value >= 0.05 else expected)


def test_more_repetitive_answers_are_worse():
    more = AnswersResult([both(True, True, loops=["pruned"])] * 9)
    fewer = AnswersResult([both(True, True, loops=["dense"])] * 9)
    assert paired(more, "loops").verdict == "worse"
    assert paired(fewer, "loops").verdict == "better"


def test_a_few_questions_show_all_outcomes():
    outcomes = {"kept": (True, True), "kept too": (True, True), "lost": (True, False), "never": (False, False)}
    answers = AnswersResult([both(*pair, prompt) for prompt, pair in outcomes.items()])
    assert [item.prompt for item in sample_questions(answers)] == ["lost", "kept", "never"]
    assert len(sample_questions(answers, 9)) == 4
    assert sample_questions(None) == []


def test_one_line_and_a_warning_where_the_difference_is_significant():
    answers = AnswersResult([both(True, False)] * 5 + [both(True, True)])
    assert answers_line(answers) == "6 test questions: correct 6 → 1, repetitive 0 → 0, finished on their own 6 → 6"
    assert answers_warning(answers) == []
    (warning,) = answers_warning(AnswersResult([both(True, False)] * 6))
    assert warning == "warning: significantly more wrong answers than the original model"
    (warning,) = answers_warning(AnswersResult([both(True, False, loops=["pruned"])] * 6))
    assert "more wrong and repetitive answers" in warning
    assert answers_warning(AnswersResult([both(False, True)] * 9)) == []
    assert outcome(Answer("", right=False, loops=True, stopped=False)) == "wrong, repetitive, cut off"
