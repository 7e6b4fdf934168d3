"""Whether two models differ on the same items, and the lines about it."""

from math import comb

import pytest

from optimum_structprune.record.answers import mcnemar, outcome, paired, remark, sample_items


def item(dense, pruned, prompt="?", loops=(False, False)):
    both = zip(("dense", "pruned"), (dense, pruned), loops, strict=True)
    made = {name: {"text": "a", "right": right, "loops": loop, "stopped": True} for name, right, loop in both}
    return {"kind": "facts", "prompt": prompt, "answers": made}


def test_the_test_of_mcnemar_is_its_definition():
    for more, less in [(0, 0), (3, 3), (1, 4), (1, 12), (12, 1)]:
        items = [item(False, True)] * more + [item(True, False)] * less + [item(True, True)] * 5
        found, apart = paired(items, "right"), more + less
        tail = sum(comb(apart, k) for k in range(min(more, less) + 1)) / 2**apart
        assert found["p_value"] == pytest.approx(min(1, 2 * tail)) and (found["more"], found["less"]) == (more, less)
        assert found["difference"] == pytest.approx((more - less) / len(items))
        assert found["verdict"] == ("alike" if found["p_value"] >= 0.05 else "better" if more > less else "worse")
    more, less = (item(True, True, loops=loops) for loops in ((False, True), (True, False)))
    assert [paired([each] * 9, "loops")["verdict"] for each in (more, less)] == ["worse", "better"]


def test_a_few_answers_show_all_outcomes():
    items = [item(True, True, "kept"), item(True, True), item(True, False, "lost"), item(False, False, "never")]
    assert [of["prompt"] for of in sample_items(items)] == ["lost", "kept", "never"]
    assert len(sample_items(items, 9)) == 4 and sample_items([]) == []


def test_one_line_and_a_warning_where_the_difference_is_no_chance():
    (line,) = remark([item(True, False)] * 5 + [item(True, True)])
    assert line == "answers to 6 short questions (dense → pruned): 6 → 1 right, 0 → 0 loop, 6 → 6 stop by themselves"
    assert "warning: the model errs clearly more; train the model" in remark([item(True, False)] * 6)[1]
    assert "errs and loops clearly more" in remark([item(True, False, loops=(False, True))] * 6)[1]
    assert len(remark([item(False, True)] * 9)) == 1 and remark([]) == [] and mcnemar(0, 0) == 1
    assert outcome({"right": False, "loops": True, "stopped": False}) == "wrong, loops, cut off"
