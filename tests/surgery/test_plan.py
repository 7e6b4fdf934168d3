"""Plans: round trip and refusal."""

import pytest
from models import build

from optimum_structprune import Plan, StructPruneError
from optimum_structprune.arch.load import describe


def test_round_trip(tmp_path):
    plan = Plan("llama", {(0, "mlp"): (0, 2, 5), (1, "mlp"): (1, 2), (1, "attention"): (3,)})
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert plan.widths() == {"mlp": {0: 3, 1: 2}, "attention": {1: 1}}


@pytest.mark.parametrize(
    "content", ["", "[]", '{"model_type": "llama"}', '{"model_type": "llama", "keep": {"mlp": 3}}']
)
def test_a_damaged_file_is_named(tmp_path, content):
    (tmp_path / "plan.json").write_text(content)
    with pytest.raises(StructPruneError, match="plan.json is not a pruning plan"):
        Plan.load(tmp_path / "plan.json")


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (Plan("opt", {}), "for a 'opt' model, this is a 'llama' model"),
        (Plan("llama", {(7, "mlp"): (0,)}), "'mlp' in block 7, which this model does not have"),
        (Plan("llama", {(0, "mlp"): (0, 40)}), "units between 0 and 39"),
        (Plan("llama", {(0, "mlp"): (2, 1)}), "ascending"),
        (Plan("llama", {(0, "mlp"): ()}), "ascending"),
    ],
)
def test_a_plan_for_another_model_is_refused(plan, message):
    with pytest.raises(StructPruneError, match=message):
        plan.check(describe(build("llama-tied")))
