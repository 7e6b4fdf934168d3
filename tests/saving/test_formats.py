"""The files of a result keep to their schemas, and those of later versions are refused."""

import json
from functools import partial
from math import inf, nan

import pytest
import results
from helpers import recovery_config
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator, ValidationError
from models import build, config, documents, tokenizer
from transformers import AutoModelForCausalLM

from optimum_structprune import (
    DomainConfig,
    Plan,
    Recovery,
    RecoveryConfig,
    StructPruneConfig,
    StructPruner,
    evaluate,
    write_report,
)
from optimum_structprune.domains.manifest import Manifest
from optimum_structprune.errors import StructPruneError
from optimum_structprune.record.report import Report
from optimum_structprune.saving.schemas import schemas, write_schemas
from optimum_structprune.written import plain, to_json


SCHEMAS = schemas()
LOADERS = {
    "structprune_config": StructPruneConfig.from_pretrained,
    "calibration_manifest": Manifest.load,
    "pruning_plan": lambda folder: Plan.load(folder / "pruning_plan.json"),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("formats") / "slim"
    pruner = StructPruner(config(rounds=2, skip_layers=[]))
    pruner.save(pruner.prune_model(build("llama-tied"), tokenizer()), folder, tokenizer())
    return pruner, folder


@pytest.mark.parametrize("name", SCHEMAS)
def test_what_is_saved_keeps_to_its_schema(name, saved):
    Draft202012Validator.check_schema(SCHEMAS[name])
    path = saved[1] / f"{name}.json"
    if not path.exists():
        assert name in ("recovery_report", "evaluation", "speed"), "a pruning alone does not write these"
        return
    document = json.loads(path.read_text())
    check = Draft202012Validator(SCHEMAS[name]).validate
    check(document)
    version = document["format_version"]
    assert version == (2 if name == "report" else 1)
    check({field: value for field, value in document.items() if field != "format_version"})
    for wrong in ({**document, "format_version": version + 1}, {**document, "unheard_of": 1}):
        with pytest.raises(ValidationError):
            check(wrong)


@pytest.mark.parametrize("fields", [
    {"widths": {"mlp": [20, 24], "attention": {0: 2}}},
    {"sparsity": 0.2, "allocation": "sensitivity", "criterion": "wanda"},
    {"budget": {"bytes": 10}, "domains": None},
    {"sparsity": 0.2, "criterion": "flap", "refit": "none"},
    {"sparsity": 0.2, "recovery": RecoveryConfig(tokens=9, lora={"r": 2}, training={"learning_rate": 1e-3})},
])  # fmt: skip
def test_every_config_keeps_to_its_schema(fields, tmp_path):
    settings = StructPruneConfig(**fields)
    settings.save_pretrained(tmp_path)
    document = json.loads((tmp_path / "structprune_config.json").read_text())
    Draft202012Validator(SCHEMAS["structprune_config"]).validate(document)
    assert StructPruneConfig.from_pretrained(tmp_path) == settings


def test_every_field_is_described():
    undescribed = []
    for name, schema in SCHEMAS.items():
        for owner, part in {name: schema, **schema.get("$defs", {})}.items():
            properties = part["properties"].items()
            undescribed += [
                f"{owner}.{field}" for field, one in properties if "const" not in one and "description" not in one
            ]
    assert undescribed == []


def test_the_module_writes_the_schemas(tmp_path):
    write_schemas(tmp_path)
    assert {path.name: json.loads(path.read_text()) for path in tmp_path.iterdir()} == {
        f"{name}.schema.json": schema for name, schema in SCHEMAS.items()
    }


@pytest.mark.parametrize("name", LOADERS)
def test_files_of_a_later_version_are_refused(name, saved, tmp_path):
    document = json.loads((saved[1] / f"{name}.json").read_text())
    for version in (2, "1", 0, None):
        (tmp_path / f"{name}.json").write_text(json.dumps({**document, "format_version": version}))
        with pytest.raises(StructPruneError, match="format_version .* is unknown, and the latest known version is 1"):
            LOADERS[name](tmp_path)


RECORDS = "report structprune_config calibration_manifest recovery_report recovery_config evaluation speed"


@pytest.mark.parametrize("name", RECORDS.split())
def test_a_page_says_which_record_is_of_a_later_version(name, tmp_path):
    (tmp_path / "report.json").write_text("{}")
    (tmp_path / f"{name}.json").write_text('{"format_version": 99}')
    with pytest.raises(StructPruneError, match=f"{name}.json: format_version 99 is unknown"):
        write_report(tmp_path)


leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.frozensets(st.text())
values = st.recursive(leaves, lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.integers(), inner))
strict = partial(json.loads, parse_constant=pytest.fail)  # who knows no `NaN` and no `Infinity`


@settings(max_examples=40)
@given(values)
def test_every_value_becomes_json_that_stays_as_it_is(value):
    document = to_json(value)
    assert strict(document) == plain(value) and to_json(strict(document)) == document


def test_reports_write_null_for_numbers_that_are_not_finite(tmp_path):
    shape = {"proposed_by": "one width", "widths": {"mlp": 8}, "predicted_loss": nan, "loss": 1.5}
    report = results.report([1.5], unseen_ratio=inf, asked=results.answers(3))
    report.shapes = [shape]
    report.recovery = results.recovery((2.0, inf), answers=results.answers(3))
    report.save(tmp_path / "report.json")
    read = strict((tmp_path / "report.json").read_text())
    assert read["shapes"][0]["predicted_loss"] is None and read["shapes"][0]["loss"] == 1.5
    assert read["recovery"]["domains"]["domain 0"]["perplexity"] == {"dense": 10.0, "pruned": 20.0, "recovered": None}
    assert read["unseen"]["perplexity"]["pruned"] is None
    Draft202012Validator(SCHEMAS["report"]).validate(read)  # with all that a training notes
    assert Report.load(tmp_path / "report.json").recovery == report.recovery


def test_a_folder_of_an_earlier_version_is_recovered_and_measured(tmp_path):
    pruner = StructPruner(config())
    pruned = pruner.prune_model(build("llama-tied"), tokenizer())
    pruner.save(pruned, tmp_path / "old", tokenizer())
    old = {"format_version": 1, "model_type": "llama", "criterion": "obs", "perplexity": {"a": {"before": 2.0}}}
    (tmp_path / "old" / "report.json").write_text(json.dumps(old))
    (tmp_path / "old" / "recovery_report.json").write_text(json.dumps({"tokens": 3}))
    (tmp_path / "old" / "recovery_config.json").write_text("{}")

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "old")
    assert evaluate(model, tokenizer(), [DomainConfig("x", documents())], seq_length=24).domains["x"].perplexity
    recovery = Recovery(recovery_config(tokens=96), pruned=tmp_path / "old")
    recovered = recovery.recover_model(model, tokenizer(), build("llama-tied"))
    recovery.save(recovered, tmp_path / "new", tokenizer())
    assert "## Recovery" in (tmp_path / "new" / "README.md").read_text()
    assert write_report(tmp_path / "new").exists()
