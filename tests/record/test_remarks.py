"""A verdict follows the known good and bad results, and nothing that gets worse makes it better; other remarks."""

import re
from math import inf
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optimum_structprune.record.remarks import LAST, RULES, VECTOR_LIMITS, remarks, removal_phrases, verdict
from optimum_structprune.record.report import Report


RATIOS, ANSWERS = st.lists(st.floats(0.9, 3), min_size=1, max_size=4), st.integers(0, 16)
ADVICE = [*(rule.advice for rule in RULES), LAST]


def answer(right: bool, loops: bool = False) -> dict:
    return {"text": "", "right": right, "loops": loops, "stopped": True}


def report(ratios, kept=16, dense=16, loops=0, asked=16, other=None) -> dict:
    """The report of a run after which so many of the dense model's right answers are still right."""
    items = [
        {"answers": {"dense": answer(n < dense), "pruned": answer(n < kept, loops=asked - n <= loops)}}
        for n in range(asked)
    ]
    return {
        "parameters": {"before": 100, "after": 90},
        "perplexity": {f"kind {n}": {"before": 10.0, "after": 10.0 * ratio} for n, ratio in enumerate(ratios)},
        "answers": items,
        **({} if other is None else {"other": {"perplexity": {"before": 10.0, "after": 10.0 * other}}}),
    }


def encoder(*shares, margin=0.0) -> dict:
    """The report of a run after which these shares of neighbours stay."""
    figures = [{"neighbours": share, "neighbours_margin": margin} for share in shares]
    embeddings = {f"kind {n}": {"before": {}, "after": each} for n, each in enumerate(figures)}
    return {"parameters": {"before": 100, "after": 90}, "embeddings": embeddings}


def level(of) -> int:
    line = verdict(of)[-1]
    return next(n for n, advice in enumerate(ADVICE) if line.startswith(f"verdict: {advice.partition(':')[0]}"))


@pytest.mark.parametrize(("ratios", "kept", "loops", "other", "expected"), [
    ((1.000, 1.001), 16, 0, None, 0),  # Gemma-3-270M, a quarter smaller as tokens
    ((1.075, 1.09), 15, 0, 1.21, 2),  # SmolLM2, a tenth as tokens
    ((1.10, 1.09, 0.98, 1.15), 13, 2, 1.25, 3),  # SmolLM2, 6 % as FFN channels
    ((1.269, 1.252, 1.041, 1.562), 10, 1, None, 3),  # 12 % as FFN channels
    ((1.748,), 6, 4, None, 4),  # 30 % as FFN channels
    ((inf,), 16, 0, None, 4), ((1.0,), 16, 0, 1.0, 0), ((1.0,), 16, 0, 1.15, 1), ((1.08,), 16, 0, inf, 2),
    ((1.7,), 16, 0, 1.0, 4),
])  # fmt: skip
def test_known_results_get_the_advice_that_they_deserve(ratios, kept, loops, other, expected):
    found = report(ratios, kept, loops=loops, other=other)
    assert level(found) == expected and (other is None or f"other text x {other:.2f}" in verdict(found)[0])


@given(st.lists(st.floats(0.9, 3), min_size=1, max_size=3), st.floats(1e-4, 0.5))
def test_the_worst_kind_is_not_said_to_lose_less_than_the_mean(ratios, margin):
    margins = {f"kind {n}": {"ratio": margin} for n in range(len(ratios))}
    mean, worst = re.findall(r" x ([\d.]+)", verdict({**report(ratios), "perplexity_margin": margins})[0])
    assert float(mean) <= float(worst)


def test_a_model_that_was_asked_alone_gets_the_verdict_of_one_that_was_not_asked():
    """As one that a run in Python pruned, once `recover` has trained it."""
    alone = report((1.0,))
    for item in alone["answers"]:
        del item["answers"]["dense"]
    assert verdict(alone) == verdict({**alone, "answers": []})


@pytest.mark.parametrize(("shares", "expected"), [
    ((0.985, 0.991), 0),  # multilingual-e5-small, 60 % smaller as tokens, of which text has no other
    ((0.916, 0.928), 1),  # the same with the tokens of its own choice
    ((0.910, 0.933, 0.982), 1),  # MiniLM, a tenth as tokens
    ((0.72, 0.71, 0.815), 3),  # multilingual-e5-small, 77 % for a loss: 8 % of its translations are lost
    ((0.746, 0.756), 1),  # an eighth of the FFN, which loses 2 % of them
    ((0.60, 0.46, 0.64), 4),  # MiniLM, half of the FFN
    ((0.99, 0.4), 4),
])  # fmt: skip
def test_known_encoders_get_the_advice_that_they_deserve(shares, expected):
    assert level(encoder(*shares)) == expected
    assert level(encoder(*(share + 0.05 for share in shares), margin=0.05)) == expected  # the lower end decides


@given(st.lists(st.floats(0, 1), min_size=1, max_size=4), st.floats(0, 1))
def test_no_neighbour_that_is_lost_makes_a_verdict_better(shares, factor):
    assert level(encoder(*(share * factor for share in shares))) >= level(encoder(*shares))
    assert verdict(encoder(*shares, None)) == []


def test_the_page_states_the_limits():
    page = (Path(__file__).parents[2] / "docs" / "how_much.md").read_text().replace(" %", "%")
    page = page.replace("1 of 8 |", "2 of 16 |").replace("1 of 4 |", "4 of 16 |")
    for rule in RULES:
        far = f"× {rule.other}" if rule.other < inf else "any"
        assert f"× {rule.mean} | × {rule.worst} | {far} | {rule.kept:.0%} | {rule.loops * 16:g} of 16 |" in page
    for least in VECTOR_LIMITS:
        assert f"| {least[0]:.0%} | {least[1]:.0%} |" in page


@given(RATIOS, ANSWERS, ANSWERS, st.none() | st.floats(0.9, 3), st.floats(1, 2), st.integers(0, 4))
def test_nothing_that_gets_worse_makes_a_verdict_better(ratios, kept, loops, other, factor, more):
    before = level(report(ratios, kept, loops=loops, other=other))
    worse = [([ratio * factor for ratio in ratios], kept, loops, other), (ratios, max(kept - more, 0), loops, other)]
    worse += [(ratios, kept, min(loops + more, 16), other), (ratios, kept, loops, other and other * factor)]
    assert all(level(report(*each[:2], loops=each[2], other=each[3])) >= before for each in worse)


def test_without_answers_it_does_not_say_that_all_is_well():
    unasked = {**report([1.0]), "answers": []}
    assert level(unasked) == 1 and "it can say no more: structprune evaluate --answers" in verdict(unasked)[-1]
    assert verdict({**unasked, "perplexity": {}}) == []


def test_it_names_the_languages_that_lose_of_those_to_keep_or_of_all_that_were_known():
    costs = ("en", 1.0), ("el", 3.0), ("de", 2.0), ("fr", 1.5), ("es", 1.4), ("nl", 9.0)
    languages = {code: {"before": 1.0, "after": cost, "known": code != "nl", "wanted": False} for code, cost in costs}
    line = verdict({**report([1.0]), "languages": languages})[-1]
    assert line == "verdict: use it as it is; not in Greek, German, French and 1 more"
    says = [*remarks({**report([1.0]), "languages": {code: languages[code] for code in ("en", "nl")}})]
    assert "of 1 language that the dense model knew, none now takes more bits per byte" in says
    for code, says in (("en", ""), ("fr", "; not in French"), ("nl", "; not in Dutch")):
        wish = {**languages, code: {**languages[code], "wanted": True}}
        assert verdict({**report([1.0]), "languages": wish})[-1] == f"verdict: use it as it is{says}"
    # What all text loses with the channels is no matter of languages.
    bits = {"bits_per_byte": {"a": {"before": 1.0, "after": 1.1}, "b": {"before": 1.0, "after": 1.45}}}
    assert verdict({**report([1.0]), "languages": languages, **bits})[-1].endswith("; not in Greek, German, French")


def test_a_training_is_judged_against_the_dense_model():
    pruned, ppl = report([1.4], kept=10), {"dense": 10.0, "pruned": 14.0, "recovered": 10.3}
    taught = {"perplexity": {"a": ppl}, "answers": report([1.0])["answers"]}
    alone = {"perplexity": {"a": {"pruned": 14.0, "recovered": 10.3}}}
    assert level({**pruned, "recovery": taught}) == 0 and level({**pruned, "recovery": alone}) == level(pruned) == 3
    figures, advice = verdict({**pruned, "recovery": {**alone, "kept_step": 4}})
    assert "(kind 0) before the training" in figures and advice.startswith("verdict: train it longer before")
    # Other text was measured again: the training has made the model better on it, too, or not.
    for trained, expected in ((10.3, 0), (11.9, 1), (13.0, 2)):
        other = {"source": "model-written", "perplexity": {**ppl, "recovered": trained}}
        of = {**report([1.4], kept=10, other=1.4), "recovery": {**taught, "other": other}}
        assert level(of) == expected and "before" not in verdict(of)[0]


def test_built_in_text_proves_no_model_good_on_other_text():
    of = report([1.0], other=1.0)
    assert level(of) == 0 and level({**of, "other": {**of["other"], "source": "built-in"}}) == 1


def test_widths_are_listed_where_layers_differ():
    sizes = {"before": 10, "after": 5}
    for widths, is_listed in (({0: 4, 1: 8}, True), ({0: 4, 1: 4}, False)):
        text = str(Report("llama", "obs", sizes, sizes, {"mlp": widths}, {"mlp": 8}))
        assert ("FFN channels by layer: 4 8" in text) == is_listed and "%" in text
    fewer = {"widths": {"layer": {"-1": 3}}, "dense_widths": {"layer": 5}, "removed_layers": [2, 3]}
    assert [*removal_phrases(fewer)] == ["2 of 5 layers (40 %): no. 2, 3"]


@pytest.mark.parametrize("nothing", [inf, None])
def test_a_loss_that_is_not_finite_is_said_in_words_before_and_after_json(nothing):
    shape = {"proposed_by": "one width", "widths": {}, "loss": nothing, "chosen": False}
    tried = [*remarks({"shapes": [shape, shape]})]
    assert len(tried) == 2 and tried[0].endswith("KL not finite")
