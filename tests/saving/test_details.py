"""What a run notes, and the lines about it."""

import json
from dataclasses import asdict
from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import build, config, tokenizer

from optimum_structprune import StructPruneError, StructPruner
from optimum_structprune.plain_json import plain
from optimum_structprune.record.facts import remarks
from optimum_structprune.record.report import Details, Report
from optimum_structprune.record.text import BARS, LONGEST_SPARK, spark_line


@pytest.fixture(scope="module")
def details():
    pruner = StructPruner(config(widths=None, sparsity=0.25, allocation="sensitivity", round_to=1))
    pruner.prune_model(build("llama-tied"), tokenizer())
    return pruner.report.details


def test_a_run_notes_what_it_saw_and_reads_it_back(details, tmp_path):
    assert details.memory
    assert details.model["bytes"]["after"] < details.model["bytes"]["before"]
    details.save(tmp_path / "details.json")
    assert Details.load(tmp_path / "details.json") == details


def test_a_later_version_and_a_damaged_file_are_refused(details, tmp_path):
    path = tmp_path / "details.json"
    names, other = ("model", "memory", "resumed"), (None, 3, "x")
    fields = [{**plain(asdict(details)), name: value} for name in names for value in other]
    fields.append({"format_version": 1, "memory": {"prune": 3}})
    for text, message in (
        ("{", "cannot be read"),
        ('{"format_version": 2}', "format_version 2 is not known here"),
        *((json.dumps(changed), "details.json is not the record of a pruning") for changed in fields),
    ):
        path.write_text(text)
        with pytest.raises(StructPruneError, match=message):
            Details.load(path)


@given(shares=st.lists(st.floats(0, 1), min_size=1, max_size=100))
def test_a_spark_line_has_a_bar_per_layer_or_the_most_there_may_be(shares):
    line = spark_line(shares)
    assert len(line) == min(len(shares), LONGEST_SPARK) and {*line} <= {*BARS}
    rising = spark_line(sorted(shares))
    assert list(rising) == sorted(rising)


def test_the_table_has_one_where_layers_differ():
    sizes = {"before": 10, "after": 5}
    for widths, bars in (({0: 4, 1: 8}, "▄█"), ({0: 4, 1: 4}, "%")):
        report = Report("llama", "obs", sizes, sizes, {"mlp": widths}, {"mlp": 8})
        row = next(line for line in str(report).splitlines() if line.startswith("width mlp"))
        assert row.endswith(bars) and "%" in row


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
