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
    balance = {"tokens": 64, "tokens_loss": 0.0, "layers_loss": nothing, "chosen": False}
    shape = {"proposed_by": "one width", "widths": {}, "loss": nothing, "chosen": False}
    compared, *tried = remarks({"balances": [balance], "shapes": [shape, shape]})
    assert compared == "compared: 64 tokens kept loses 0.0000 nats, and asks more of the layers than they have"
    assert len(tried) == 2 and tried[0].endswith("KL not finite")


def test_what_layers_lose_beside_fewer_tokens_is_said_to_be_predicted_where_it_is():
    balance = {"tokens": 64, "tokens_loss": 0.0, "layers_loss": 0.5, "chosen": False}
    every = [{**balance, "measured": True}, {**balance, "measured": False}, balance]  # older reports do not say
    said = [remark.endswith("0.5000 in the layers, as predicted") for remark in remarks({"balances": every})]
    assert said == [False, True, False]
