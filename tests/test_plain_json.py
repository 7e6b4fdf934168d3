"""What is written as JSON is JSON to every reader, whatever numbers came of a run."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import build, config

from optimum_structprune.dryrun import dry_run
from optimum_structprune.evaluation.evaluate import Evaluation
from optimum_structprune.plain_json import plain, to_json
from optimum_structprune.record.report import Report
from optimum_structprune.recovery.resume import TrainingInputs
from optimum_structprune.recovery.trainer import RecoveryOutcome


leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.frozensets(st.text())
values = st.recursive(leaves, lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.integers(), inner))


def strict(text: str):
    """What a reader takes that knows no `NaN` and no `Infinity`."""

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


@given(values)
def test_every_value_becomes_json_that_stays_as_it_is(value):
    document = to_json(value)
    assert strict(document) == plain(value)
    assert to_json(strict(document)) == document


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_reports_write_null_for_what_is_no_number(bad, tmp_path):
    ratios = {"shares": {"a": 1.0}, "widths": {"mlp": {0: 8}}, "perplexity_ratio": {"a": bad, "b": 1.5}}
    sizes = {"before": 4, "after": 2}
    report = Report("llama", "obs", layer_parameters=sizes, parameters=sizes, rounds=[{**ratios, "holds": False}])
    report.recovery = RecoveryOutcome(perplexity={"a": {"pruned": 2.0, "recovered": bad}})
    report.save(tmp_path / "report.json")
    read = strict((tmp_path / "report.json").read_text())
    assert read["rounds"][0]["perplexity_ratio"] == {"a": None, "b": 1.5}
    assert read["recovery"]["perplexity"]["a"] == {"pruned": 2.0, "recovered": None}
    Evaluation("small", divergence={"a": bad}).save(tmp_path / "evaluation.json")
    assert strict((tmp_path / "evaluation.json").read_text())["divergence"] == {"a": None}
    TrainingInputs({"learning_rate": bad, "names": {"b", "a"}}).save(tmp_path)
    assert strict((tmp_path / "recovery_inputs.json").read_text()) == {"learning_rate": None, "names": ["a", "b"]}
    plan = dry_run(build("llama-tied").config, config())
    replace(plan, notes=(bad,)).save(tmp_path / "plan.json")
    assert strict((tmp_path / "plan.json").read_text())["notes"] == [None]


def test_the_domain_that_stopped_a_floor_is_the_one_without_a_number():
    for ratios in ({"a": 1.1, "b": float("nan")}, {"b": float("nan"), "a": 1.1}):
        rounds = [{"shares": {"a": 1.0}, "perplexity_ratio": ratios, "holds": False}]
        sizes = {"before": 4, "after": 2}
        report = Report("llama", "obs", parameters=sizes, layer_parameters=sizes, rounds=rounds)
        assert "perplexity b x nan" in str(report)
