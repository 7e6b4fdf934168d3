"""What a run notes, and the lines about it."""

from math import inf

import pytest
from models import build, config, tokenizer

from optimum_structprune import StructPruner
from optimum_structprune.record.remarks import remarks
from optimum_structprune.record.report import Report


def test_a_run_notes_what_it_saw():
    pruner = StructPruner(config(widths=None, sparsity=0.25, allocation="sensitivity", round_to=1))
    model = pruner.prune_model(build("llama-tied"), tokenizer())
    assert pruner.report.weights["after"] < pruner.report.weights["before"]
    assert pruner.report.model["dtype"] == str(model.dtype).removeprefix("torch.")


def test_widths_are_listed_where_layers_differ():
    sizes = {"before": 10, "after": 5}
    for widths, is_listed in (({0: 4, 1: 8}, True), ({0: 4, 1: 4}, False)):
        text = str(Report("llama", "obs", sizes, sizes, {"mlp": widths}, {"mlp": 8}))
        assert ("FFN channels by layer: 4 8" in text) == is_listed and "%" in text


@pytest.mark.parametrize("nothing", [inf, None])
def test_a_loss_that_is_not_finite_is_said_in_words_before_and_after_json(nothing):
    shape = {"proposed_by": "one width", "widths": {}, "loss": nothing, "chosen": False}
    tried = [*remarks({"shapes": [shape, shape]})]
    assert len(tried) == 2 and tried[0].endswith("KL not finite")
