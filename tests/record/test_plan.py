"""Plans: one after another, and refusal; `test_fuzz.py` has the round trip."""

import pytest
from models import full_disk

from optimum_structprune import Plan, StructPruneError
from optimum_structprune.arch.spec import MODEL


@pytest.mark.parametrize(("content", "message"), [
    ("", "plan.json cannot be read"),
    ("[]", "plan.json must hold a mapping of fields, got list"),
    ('{"model_type": "llama"}', "plan.json is not a pruning plan: KeyError\\('keep'\\)"),
    ('{"model_type": "llama", "keep": {"mlp": {"0": 3}}}', "plan.json is not a pruning plan"),
])  # fmt: skip
def test_a_damaged_file_is_named(tmp_path, content, message):
    (tmp_path / "plan.json").write_text(content)
    with pytest.raises(StructPruneError, match=message):
        Plan.load(tmp_path / "plan.json")


def test_a_full_disk_leaves_the_plan_that_was_there(tmp_path):
    plan = Plan("llama", {(0, "mlp"): (1, 2)})
    plan.save(file := tmp_path / "plan.json")
    with full_disk(100), pytest.raises(OSError, match="plan.json"):
        Plan("llama", {(0, "mlp"): (*range(99),)}).save(file)
    assert Plan.load(file) == plan and [*tmp_path.iterdir()] == [file]


def test_a_later_plan_is_in_the_numbers_of_the_model_that_the_first_one_leaves():
    first = Plan("mixtral", {(MODEL, "layer"): (0, 2, 3), (2, "expert"): (1, 3), (2, "attention"): (0, 2, 3)})
    # Layers 2 and 3 of the dense model stay, so `mlp` of layer 0 goes; expert 0 of what is layer 1 then was expert 1.
    later = {(MODEL, "layer"): (1, 2), (0, "mlp"): (5,), (1, "expert"): (1,), (1, "attention"): (1, 2)}
    later |= {(1, "mlp/0"): (4, 6), (1, "mlp/shared"): (7,)}
    both = {(MODEL, "layer"): (2, 3), (2, "expert"): (3,), (2, "attention"): (2, 3)}
    both |= {(2, "mlp/1"): (4, 6), (2, "mlp/shared"): (7,)}
    assert first.then(Plan("mixtral", later)) == Plan("mixtral", both)
    with pytest.raises(StructPruneError, match="later plan keeps units of .* that this plan has removed"):
        first.then(first)
