"""Every field of the files of a result is described, and files of later versions are refused."""

import json
from dataclasses import fields, is_dataclass
from functools import partial
from inspect import getdoc
from math import inf, nan

import pytest
import results
from hypothesis import given, settings
from hypothesis import strategies as st
from models import build, config, tokenizer

from optimum_structprune import (
    Plan,
    StructPruneConfig,
    StructPruner,
    write_report,
)
from optimum_structprune.domains.manifest import Manifest
from optimum_structprune.record import figures, report
from optimum_structprune.record.report import Report
from optimum_structprune.system.codec import to_plain
from optimum_structprune.system.errors import StructPruneError
from optimum_structprune.system.written import to_json


LOADERS = {
    "structprune_config": StructPruneConfig.from_pretrained,
    "calibration_manifest": Manifest.load,
    "pruning_plan": lambda folder: Plan.load(folder / "pruning_plan.json"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Save a pruned model and return its folder."""
    folder = tmp_path_factory.mktemp("formats") / "slim"
    pruner = StructPruner(config(rounds=2, skip_layers=[]))
    pruner.save(pruner.prune_model(build("llama-tied"), tokenizer()), folder, tokenizer())
    return folder


def test_every_field_of_a_record_has_a_description():
    undescribed = []
    for record in (report, figures):
        for name, kind in vars(record).items():
            if not is_dataclass(kind):
                continue
            text = "".join(getdoc(ancestor) or "" for ancestor in kind.__mro__ if is_dataclass(ancestor))
            undescribed += [f"{name}.{field.name}" for field in fields(kind) if f"    {field.name}: " not in text]
    assert undescribed == []


@pytest.mark.parametrize("name", LOADERS)
def test_files_of_a_later_version_are_refused(name, folder, tmp_path):
    document = json.loads((folder / f"{name}.json").read_text())
    for version in (2, "1", 0, None):
        (tmp_path / f"{name}.json").write_text(json.dumps(document | {"format_version": version}))
        with pytest.raises(StructPruneError, match="format_version .* is unknown, and this version of .* reads 1"):
            LOADERS[name](tmp_path)


RECORDS = "report structprune_config calibration_manifest recovery_report recovery_config evaluation speed"


@pytest.mark.parametrize("name", RECORDS.split())
def test_a_page_names_the_record_of_a_later_version(name, tmp_path):
    Report(model_type="llama", criterion="obs").save(tmp_path / "report.json")
    (tmp_path / f"{name}.json").write_text('{"format_version": 99}')
    with pytest.raises(StructPruneError, match=f"{name}.json: format_version 99 is unknown"):
        write_report(tmp_path)


leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.frozensets(st.text())
values = st.recursive(leaves, lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.integers(), inner))
# Strict JSON has no `NaN` and no `Infinity`.
parse_strictly = partial(json.loads, parse_constant=pytest.fail)


@settings(max_examples=40)
@given(values)
def test_every_value_becomes_strict_json_that_reloads_unchanged(value):
    document = to_json(value)
    reloaded = parse_strictly(document)
    assert reloaded == to_plain(value)
    assert to_json(reloaded) == document


def test_reports_write_null_for_numbers_that_are_not_finite(tmp_path):
    written = results.report([1.5], unseen_ratio=inf, asked=results.answers(3))
    written.shapes = [{"proposed_by": "one width", "widths": {"mlp": 8}, "predicted_loss": nan, "loss": 1.5}]
    written.recovery = results.recovery((2.0, inf), answers=results.answers(3))
    written.save(tmp_path / "report.json")

    document = parse_strictly((tmp_path / "report.json").read_text())
    assert document["shapes"][0]["predicted_loss"] is None
    assert document["shapes"][0]["loss"] == 1.5
    perplexity = document["recovery"]["domains"]["domain 0"]["perplexity"]
    assert perplexity == {"original": 10.0, "pruned": 20.0, "recovered": None}
    assert document["unseen"]["perplexity"]["pruned"] is None

    assert Report.load(tmp_path / "report.json").recovery == written.recovery
