"""Plans: damaged files, and a second plan after a first one. `test_fuzz.py` tests saved and loaded plans."""

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


def test_a_full_disk_does_not_damage_a_saved_plan(tmp_path):
    path = tmp_path / "plan.json"
    plan = Plan("llama", {(0, "mlp"): (1, 2)})
    plan.save(path)
    large_plan = Plan("llama", {(0, "mlp"): tuple(range(99))})

    with full_disk(100), pytest.raises(OSError, match="plan.json"):
        large_plan.save(path)

    assert Plan.load(path) == plan
    assert list(tmp_path.iterdir()) == [path]


def test_a_later_plan_uses_the_numbers_of_the_model_after_the_first_plan():
    first = Plan("mixtral", {(MODEL, "layer"): (0, 2, 3), (2, "expert"): (1, 3), (2, "attention"): (0, 2, 3)})
    # The first plan removes layer 1, so layer 1 of the result was layer 2, and its expert 0 was expert 1.
    later_units = {
        (MODEL, "layer"): (1, 2),
        (0, "mlp"): (5,),
        (1, "expert"): (1,),
        (1, "attention"): (1, 2),
        (1, "mlp/0"): (4, 6),
        (1, "mlp/shared"): (7,),
    }
    # The later plan removes layer 0, so the channels of its `mlp` do not matter.
    combined_units = {
        (MODEL, "layer"): (2, 3),
        (2, "expert"): (3,),
        (2, "attention"): (2, 3),
        (2, "mlp/1"): (4, 6),
        (2, "mlp/shared"): (7,),
    }

    assert first.then(Plan("mixtral", later_units)) == Plan("mixtral", combined_units)


def test_a_later_plan_cannot_keep_removed_units():
    first = Plan("mixtral", {(MODEL, "layer"): (0, 2, 3), (2, "expert"): (1, 3), (2, "attention"): (0, 2, 3)})

    with pytest.raises(StructPruneError, match="later plan keeps units of .* that this plan has removed"):
        first.then(first)
