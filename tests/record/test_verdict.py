"""Verdicts: known good and bad results, and no better verdict for a worse figure."""

from math import inf
from pathlib import Path

import pytest
import results
from hypothesis import given
from hypothesis import strategies as st

from optimum_structprune.record.figures import PRUNED, Figure, LanguageResult, Reading
from optimum_structprune.record.verdict import LIMITS, NEIGHBOUR_LIMITS, RETRIEVAL_LIMITS, Level, judge


RATIOS = st.lists(st.floats(0.9, 3), min_size=1, max_size=4)
COUNTS = st.integers(0, 32)


def level_of(ratios, correct=32, loops=0, unseen=None) -> Level:
    """Return the level of a model with these losses, correct answers and repetitive answers."""
    report = results.report(ratios, unseen_ratio=unseen, asked=results.answers(correct, loops=loops))
    return judge(report).level


@pytest.mark.parametrize(("ratios", "correct", "loops", "unseen", "expected"), [
    ((1.000, 1.001), 32, 0, None, Level.READY),  # Gemma-3-270M, a quarter smaller by its vocabulary
    ((1.075, 1.09), 30, 0, 1.21, Level.OWN_DOMAINS),  # SmolLM2, a tenth smaller by its vocabulary
    ((1.10, 1.09, 0.98, 1.15), 26, 4, 1.25, Level.RECOVER),  # SmolLM2, 6% smaller by FFN channels
    ((1.269, 1.252, 1.041, 1.562), 20, 2, None, Level.RECOVER),  # 12% by FFN channels
    ((1.748,), 12, 8, None, Level.UNUSABLE),  # 30% by FFN channels
    ((inf,), 32, 0, None, Level.UNUSABLE),
    ((1.0,), 32, 0, 1.0, Level.READY),
    ((1.0,), 32, 0, 1.15, Level.TEST_FIRST),
    ((1.08,), 32, 0, inf, Level.OWN_DOMAINS),
    ((1.7,), 32, 0, 1.0, Level.UNUSABLE),
])  # fmt: skip
def test_known_results_have_the_expected_level(ratios, correct, loops, unseen, expected):
    assert level_of(ratios, correct, loops, unseen) == expected


@given(RATIOS, COUNTS, COUNTS, st.none() | st.floats(0.9, 3), st.floats(1, 2), st.integers(0, 4))
def test_a_worse_figure_makes_no_verdict_better(ratios, correct, loops, unseen, factor, count):
    original_level = level_of(ratios, correct, loops, unseen)
    worse_ratios = [ratio * factor for ratio in ratios]

    assert level_of(worse_ratios, correct, loops, unseen) >= original_level
    assert level_of(ratios, max(correct - count, 0), loops, unseen) >= original_level
    assert level_of(ratios, correct, min(loops + count, 32), unseen) >= original_level
    if unseen is not None:
        assert level_of(ratios, correct, loops, unseen * factor) >= original_level


@given(RATIOS, COUNTS, COUNTS, st.none() | st.floats(0.9, 3))
def test_every_level_but_the_best_has_reasons(ratios, correct, loops, unseen):
    report = results.report(ratios, unseen_ratio=unseen, asked=results.answers(correct, loops=loops))

    verdict = judge(report)

    assert bool(verdict.reasons) == (verdict.level != Level.READY)


def test_the_reasons_name_the_figures():
    report = results.report([1.25], margin=0.04, unseen_ratio=1.5, asked=results.answers(kept=20))

    assert str(judge(report)) == (
        "needs recovery before use (1.25× ± 0.04 on the calibration domains, "
        "correct answers 32 → 20 of 32, at least 45%)"
    )


def test_the_figure_of_a_single_domain_is_named_once():
    report = results.report([1.75], margin=0.04, unseen_ratio=1.5, asked=results.answers())

    assert judge(report).reasons == ["1.75× ± 0.04 on the calibration domains"]


@pytest.mark.parametrize(("shares", "expected"), [
    ((0.985, 0.991), Level.READY),  # multilingual-e5-small, 60% smaller; the text has no removed token
    ((0.916, 0.928), Level.READY),  # the same model, which chose the tokens itself
    ((0.910, 0.933, 0.982), Level.READY),  # MiniLM, a tenth smaller
    ((0.72, 0.71, 0.815), Level.TEST_FIRST),  # multilingual-e5-small, 77% smaller: it loses 8% of its translations
    ((0.746, 0.756), Level.TEST_FIRST),  # an eighth of the FFN; it loses 2% of its translations
    ((0.60, 0.46, 0.64), Level.RECOVER),  # MiniLM, half of the FFN: it loses 5% of its labelled retrieval
    ((0.99, 0.3), Level.UNUSABLE),
])  # fmt: skip
def test_known_encoders_have_the_expected_level(shares, expected):
    for retrieval in (None, 1.0):
        assert judge(results.encoder(*shares, retrieval=retrieval)).level == expected

    # The lower ends of the intervals decide.
    upper_shares = [share + 0.05 for share in shares]
    assert judge(results.encoder(*upper_shares, margin=0.05)).level == expected


@pytest.mark.parametrize(("retrieval", "expected"), [
    (1.02, Level.READY), (0.96, Level.TEST_FIRST), (0.9, Level.RECOVER), (0.7, Level.UNUSABLE),
])  # fmt: skip
def test_a_lost_retrieval_counts_even_if_all_neighbours_are_kept(retrieval, expected):
    verdict = judge(results.encoder(1.0, margin=0.001, retrieval=retrieval))
    assert verdict.level == expected
    if expected is not Level.READY:
        assert verdict.reasons == [f"{retrieval:.3f}× ± 0.001 of the retrieval"]

    # A loss within the interval does not count.
    assert judge(results.encoder(1.1, margin=0.3, retrieval=retrieval)).level == Level.READY


@given(st.lists(st.floats(0, 1), min_size=1, max_size=4), st.floats(0.1, 1), st.floats(0, 1), st.floats(0.1, 1))
def test_a_worse_encoder_has_no_better_verdict(shares, retrieval, factor, other_factor):
    original_level = judge(results.encoder(*shares, retrieval=retrieval)).level
    lower_shares = [share * factor for share in shares]

    assert judge(results.encoder(*lower_shares, retrieval=retrieval * other_factor)).level >= original_level


@given(st.lists(st.floats(0, 1), min_size=1, max_size=4))
def test_an_encoder_with_an_unmeasured_domain_has_no_verdict(shares):
    assert judge(results.encoder(*shares, None)) is None


def test_the_documentation_states_the_limits():
    page = (Path(__file__).parents[2] / "docs" / "how_much.md").read_text()

    for limits in LIMITS.values():
        unseen = "any"
        if limits.unseen < inf:
            unseen = f"{limits.unseen}×"
        losses = f"{limits.mean}× | {limits.worst}× | {unseen}"
        answers = f"{limits.right:.0%} | {limits.agreement} | {limits.new_loops * 32:g} of 32"
        assert f"| {losses} | {answers} |" in page

    for level, (mean, worst) in NEIGHBOUR_LIMITS.items():
        assert f"| {mean:.0%} | {worst:.0%} | {RETRIEVAL_LIMITS[level]:.0%} |" in page


def test_few_questions_promise_less_than_many():
    """The lower end of the interval decides, not the share of correct answers."""
    losses = [1.0, 1.0]
    for asked, expected in ((16, Level.TEST_FIRST), (32, Level.READY), (640, Level.READY)):
        answers = results.answers(kept=asked, correct=asked, asked=asked)
        assert judge(results.report(losses, asked=answers)).level == expected
    for asked, expected in ((32, Level.TEST_FIRST), (640, Level.READY)):
        answers = results.answers(kept=asked - asked // 32, correct=asked, asked=asked)
        assert judge(results.report(losses, asked=answers)).level == expected


def test_a_model_that_gives_other_answers_than_the_original_model_is_not_ready():
    answers = results.answers()
    for question in answers.questions:
        question.first.reading = Reading(40, 40, 40, -9.0)
        question.last.reading = Reading(40, 36, 12, -11.0)

    verdict = judge(results.report([1.0], asked=answers))

    assert verdict.level == Level.TEST_FIRST
    assert verdict.reasons == ["agreement 0.900 ± 0.003 with the original model's answers"]


def test_answers_without_the_original_model_are_not_counted():
    answers = results.answers()
    for question in answers.questions:
        del question.answers["original"]

    verdict = judge(results.report([1.0], asked=answers))

    assert verdict == judge(results.report([1.0]))
    assert verdict.level == Level.TEST_FIRST
    assert str(verdict).endswith("answers were not checked")


def test_answers_that_were_collected_later_count():
    report = results.report([1.0])

    assert judge(report, results.answers()).level == Level.READY
    assert judge(report, results.answers(kept=3)).level == Level.UNUSABLE


def test_a_report_without_a_measurement_has_no_verdict():
    assert judge(results.report([])) is None


def test_languages_that_got_worse_are_named():
    costs = {"en": 1.0, "el": 3.0, "de": 2.0, "fr": 1.5, "es": 1.4, "nl": 9.0}
    report = results.report([1.0], asked=results.answers())
    for code, cost in costs.items():
        report.languages[code] = LanguageResult(cost=results.cost(cost), known=code != "nl")
    assert str(judge(report)) == "ready to use; Greek, German, French and 1 more got worse"

    for code, text in (
        ("en", ""),
        ("fr", "; French got worse"),
        ("nl", "; the original model does not support Dutch"),
    ):
        report.languages[code].wanted = True
        assert str(judge(report)) == f"ready to use{text}"
        report.languages[code].wanted = False

    # Removed channels make all text worse, so only languages that are worse than the worst domain are named.
    report.domains["domain 0"].bits_per_byte = results.cost(1.45)
    assert str(judge(report)).endswith("; Greek, German, French got worse")


def test_a_training_is_judged_against_the_original_model():
    report = results.report([1.4], asked=results.answers(kept=20))
    assert judge(report).level == Level.RECOVER

    report.recovery = results.recovery((1.4, 1.03), answers=results.answers())
    assert judge(report).level == Level.READY

    report.recovery = results.recovery((1.4, 1.03), has_original=False, kept_step=4)
    assert judge(report).level == Level.RECOVER
    assert judge(report).advice == "needs a longer recovery before use"


def test_a_trained_model_is_not_judged_by_the_answers_before_the_training():
    report = results.report([1.4], asked=results.answers(kept=20))

    report.recovery = results.recovery((1.4, 1.03), kept_step=4)
    assert report.latest().answers is None
    assert "answers were not checked" in str(judge(report))

    report.recovery = results.recovery((1.4, 1.4), kept_step=0)
    assert report.latest().answers is report.answers


def test_a_training_is_judged_on_unseen_text():
    report = results.report([1.4], unseen_ratio=1.4, asked=results.answers(kept=20))

    for ratio, expected in ((1.03, Level.READY), (1.19, Level.TEST_FIRST), (1.3, Level.OWN_DOMAINS)):
        report.recovery = results.recovery((1.4, 1.03), answers=results.answers())
        report.recovery.unseen = results.unseen(1.4, ratio)
        assert judge(report).level == expected


def test_a_model_is_not_ready_if_its_unseen_text_is_built_in():
    report = results.report([1.0], unseen_ratio=1.0, asked=results.answers())
    assert judge(report).level == Level.READY

    report.unseen.source = "built-in"
    assert judge(report).level == Level.TEST_FIRST


def test_a_domain_with_an_infinite_perplexity_makes_a_model_unusable():
    report = results.report([1.0])
    report.domains["domain 0"].perplexity = Figure.of({"original": 10.0, PRUNED: inf})

    assert judge(report).level == Level.UNUSABLE
