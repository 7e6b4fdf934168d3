"""What a table shows of a figure is as exact as its margin of error, and every form shows the same."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optimum_structprune.record.table import as_text, models_of, quality_rows, side_by_side, speed_rows


def of(ratio, margin=None, documents=90, names=("a",)):
    """A report of a perplexity that grew from 10 by a factor on each text."""
    both = {"before": 10.0, "after": 10.0 * ratio}
    margins = {} if margin is None else {name: {"ratio": margin} for name in names}
    counts = {"tokens": dict.fromkeys(names, 9_000), "documents": dict.fromkeys(names, documents), "margin": margins}
    return {"perplexity": dict.fromkeys(names, both), **{f"perplexity_{name}": of for name, of in counts.items()}}


@pytest.mark.parametrize(("margin", "documents", "shown"), [
    (0.2, 90, "x 1.5 ± 0.2"), (0.04, 90, "x 1.50 ± 0.04"), (0.0004, 90, "x 1.500 ± 0.000"), (2.0, 90, "x 2 ± 2"),
    (None, 90, "x 1.500"), (None, 4, "x 1.5 rough"),
])  # fmt: skip
def test_digits_follow_the_margin_of_error_and_without_one_the_number_of_documents(margin, documents, shown):
    assert quality_rows(of(1.5, margin, documents))[0].cells()[-1] == shown


@pytest.mark.parametrize("kinds", [2, 4, 9])
def test_the_margin_of_a_mean_is_that_of_one_text_over_the_root_of_their_number(kinds):
    *_, mean = quality_rows(of(2, 0.3, names=[f"text {n}" for n in range(kinds)]))
    assert mean.label.strip() == "geometric mean" and mean.ratio == pytest.approx(2)
    assert mean.margins[-1] == pytest.approx(0.3 / kinds**0.5)


@given(st.lists(st.floats(0.5, 3), min_size=1, max_size=4))
def test_models_of_several_records_stand_side_by_side(ratios):
    every = {f"small {n}": of(ratio) for n, ratio in enumerate(ratios)}
    record = side_by_side((report, {"before": "dense", "after": name}) for name, report in every.items())
    assert models_of(record) == ["dense", *every] and "perplexity a (9,000 tokens)" in as_text(record)
    assert [*record["perplexity"]["a"].values()] == pytest.approx([10.0, *(10.0 * ratio for ratio in ratios)])


def test_what_has_no_dense_value_is_compared_with_the_first_known_one():
    taught = {"perplexity": {"a": {"dense": 1.0, "pruned": 3.0, "recovered": 2.0}}}
    taught["divergence"] = {"a": {"pruned": 0.4, "recovered": 0.1}}
    ratio, far = (row.cells()[-1] for row in quality_rows(taught))
    assert (ratio, far) == ("x 2.000", "-75.0%")
    judged = {"perplexity": {"a": {"dense": 1.0, "model": 3.0}}, "divergence": {"a": 0.25}}
    assert quality_rows(judged)[-1].cells() == ["KL a", "–", "0.2500", ""]
    judged = {"perplexity": {"a": {"dense": 1.0, "x": 3.0, "y": 2.0}}, "divergence": {"a": {"x": 0.4, "y": 0.1}}}
    assert quality_rows(judged)[-1].cells() == ["KL a", "–", "0.4000", "0.1000", ""]


def test_a_speed_up_is_shown_where_its_quartiles_lie_on_one_side_of_1():
    ends = {"dense": (1, 1, 1), "fast": (1.1, 1.2, 1.3), "same": (0.9, 1.1, 1.2), "slow": (0.7, 0.8, 0.9)}
    timed = {
        name: {"tokens_per_second": 8.0, "speedup": dict(zip(("low", "median", "high"), of, strict=True))}
        for name, of in ends.items()
    }
    record = {"decode": {"batch 1": timed}, "run_memory": {"batch 1": dict.fromkeys(ends, 8)}}
    _, speed_up, quartiles, memory = (row.cells() for row in speed_rows(record))
    assert speed_up == ["writing speed-up, batch 1", "–", "1.200", "–", "0.800", ""]
    assert quartiles[2:] == ["1.100-1.300", "0.900-1.200", "0.700-0.900", ""] and memory[-1] == "+0.0%"
    del timed["slow"]
    del record["run_memory"]["batch 1"]["slow"]
    assert speed_rows(record)[1].cells()[-1] == "not shown"
