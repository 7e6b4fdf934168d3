"""What a table shows of a figure is as exact as its standard error."""

import pytest

from optimum_structprune.record.facts import Facts, quality_rows


@pytest.mark.parametrize(("error", "shown"), [
    (0.2, "x 1.5 ± 0.2"), (0.04, "x 1.50 ± 0.04"), (0.0004, "x 1.500 ± 0.000"), (2.0, "x 2 ± 2"), (None, "x 1.500"),
])  # fmt: skip
def test_digits_follow_the_standard_error(error, shown):
    dense = Facts(perplexity={"a": 10.0}, tokens={"a": 9_000})
    model = Facts(perplexity={"a": 15.0}, ratio_stderr={"a": error}, tokens={"a": 9_000})
    assert quality_rows([dense, model])[0].compared() == shown


def test_a_few_tokens_without_an_error_give_one_digit():
    few = Facts(perplexity={"a": 10.0}, tokens={"a": 1_000})
    assert quality_rows([few, Facts(perplexity={"a": 12.3}, tokens={"a": 1_000})])[0].compared() == "x 1.2 rough"


@pytest.mark.parametrize("kinds", [2, 4, 9])
def test_the_error_of_a_mean_is_that_of_one_text_over_the_root_of_their_number(kinds):
    names = [f"text {n}" for n in range(kinds)]
    dense = Facts(perplexity=dict.fromkeys(names, 10.0))
    model = Facts(perplexity=dict.fromkeys(names, 20.0), ratio_stderr=dict.fromkeys(names, 0.3))
    mean = next(row for row in quality_rows([dense, model]) if row.label.strip() == "geometric mean")
    assert mean.ratio == pytest.approx(2) and mean.errors[-1] == pytest.approx(0.3 / kinds**0.5)
