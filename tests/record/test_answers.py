"""Whether two models differ on the same items."""

from math import comb

import pytest

from optimum_structprune.record.answers import paired


def test_the_test_of_mcnemar_is_its_definition():
    for more, less in [(0, 0), (3, 3), (1, 4), (1, 12), (12, 1)]:
        scores = [(False, True)] * more + [(True, False)] * less + [(True, True)] * 5
        items = [{"answers": {"dense": {"right": dense}, "model": {"right": model}}} for dense, model in scores]
        found = paired(items, "right")
        apart = more + less
        tail = sum(comb(apart, k) for k in range(min(more, less) + 1)) / 2**apart
        assert found["p_value"] == pytest.approx(min(1, 2 * tail)) and (found["more"], found["less"]) == (more, less)
        assert found["difference"] == pytest.approx((more - less) / len(items))
        assert found["verdict"] == ("alike" if found["p_value"] >= 0.05 else "better" if more > less else "worse")
        looping = paired(
            [{"answers": {name: {"loops": of["right"]} for name, of in item["answers"].items()}} for item in items],
            "loops",
        )
        turned = {"better": "worse", "worse": "better", "alike": "alike"}
        assert looping["verdict"] == turned[found["verdict"]], "the less, the better"
