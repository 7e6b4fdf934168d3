"""Figures of several models, and the conversion of results to JSON and back."""

import json
from math import inf, nan

import pytest
import results
import torch
from hypothesis import given
from hypothesis import strategies as st

from optimum_structprune import StructPruneError
from optimum_structprune.record.figures import Figure, LanguageResult, TextResult, mean_ratio, perplexity_result
from optimum_structprune.record.report import CurvePoint, RecoveryReport, Report
from optimum_structprune.system.margins import margin_of_error
from optimum_structprune.system.written import to_json


numbers = st.none() | st.floats(0.1, 1e6) | st.just(inf)
figures = st.builds(Figure, numbers, numbers, numbers, st.none() | st.floats(0, 9))
languages = st.builds(LanguageResult, cost=figures, wanted=st.booleans(), known=st.none() | st.booleans())
domains = st.builds(TextResult, figures, st.none() | figures, tokens=st.integers(0, 99), documents=st.integers(0, 9))
recoveries = st.none() | st.builds(
    RecoveryReport,
    tokens=st.integers(0, 99),
    domains=st.dictionaries(st.text(), domains, max_size=2),
    curve=st.lists(st.builds(CurvePoint, st.integers(0, 99), st.floats(0, 9)), max_size=3),
)
reports = st.builds(
    Report,
    model_type=st.text(),
    criterion=st.text(),
    widths=st.dictionaries(st.text(), st.dictionaries(st.integers(-1, 9), st.integers(1, 9), max_size=3), max_size=2),
    domains=st.dictionaries(st.text(), domains, max_size=3),
    languages=st.dictionaries(st.sampled_from(["de", "fr"]), languages),
    answers=st.none() | st.builds(results.answers, st.integers(0, 3), asked=st.just(3)),
    recovery=recoveries,
)


@given(reports)
def test_a_report_is_unchanged_after_a_conversion_to_json(report):
    values = json.loads(to_json(report.to_dict()))

    assert Report.from_dict(values) == report


@pytest.mark.parametrize(("values", "message"), [
    ({"criterion": "obs"}, "needs the field `model_type`"),
    ({"model_type": "llama", "criterion": "obs", "pace": 1}, "has no field 'pace'"),
    ({"model_type": 3, "criterion": "obs"}, "`model_type` must be a string, got 3"),
    ({"model_type": "llama", "criterion": "obs", "domains": []}, "`domains` must be a mapping to TextResult"),
    ({"model_type": "llama", "criterion": "obs", "domains": {"a": {"tokens": "x"}}}, "a: `tokens` must be a whole"),
    ({"model_type": "llama", "criterion": "obs", "widths": {"mlp": {"x": 3}}}, "mlp must have layer indices as keys"),
    ([], r"must be a mapping of fields, got \[\]"),
])  # fmt: skip
def test_an_invalid_report_is_refused(values, message):
    with pytest.raises(StructPruneError, match=message):
        Report.from_dict(values)


def test_the_ratio_compares_the_last_model_with_the_first():
    def ratio(**values):
        return Figure.of(values).ratio

    assert ratio(original=10.0, pruned=15.0) == 1.5
    assert ratio(original=10.0, pruned=15.0, recovered=12.0) == 1.2
    assert ratio(pruned=15.0, recovered=12.0) == 0.8
    assert ratio(original=10.0, pruned=inf) == inf
    assert ratio(pruned=3.0) is None
    assert ratio() is None


def test_a_margin_that_is_not_a_number_is_missing():
    assert Figure.of({"original": 1.0, "pruned": 2.0}, nan).margin is None


@pytest.mark.parametrize("count", [2, 4, 9])
def test_the_margin_of_a_mean_decreases_with_the_root_of_the_number_of_texts(count):
    mean, margin = mean_ratio([results.figure(2.0, margin=0.3)] * count)

    assert mean == pytest.approx(2)
    assert margin == pytest.approx(0.3 / count**0.5)


def test_the_mean_of_figures_without_a_margin_has_no_margin():
    _, margin = mean_ratio([results.figure(2.0, margin=0.3), results.figure(2.0)])

    assert margin is None


def test_a_perplexity_and_its_margin_follow_from_the_losses():
    torch.manual_seed(0)
    original = torch.rand(40, dtype=torch.float64)
    pruned = original + torch.rand(40, dtype=torch.float64)

    result = perplexity_result({"original": original, "pruned": pruned}, 400)

    ratio = float((pruned - original).mean().exp())
    assert result.perplexity.original == pytest.approx(float(original.mean().exp()))
    assert result.perplexity.ratio == pytest.approx(ratio)
    assert result.perplexity.margin == pytest.approx(ratio * margin_of_error(pruned - original))
    assert result.tokens == 400
    assert result.documents == 40

    single = perplexity_result({"pruned": pruned}, 400).perplexity
    assert single.margin == pytest.approx(float(pruned.mean().exp()) * margin_of_error(pruned))

    wide = perplexity_result({"original": original, "pruned": pruned}, 400, spread=0.5)
    assert wide.perplexity.margin > result.perplexity.margin
