"""The files of a result keep to their schemas, and those of later versions are refused."""

import json
from dataclasses import fields
from functools import partial
from importlib.resources import files
from math import nan

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator, ValidationError
from models import build, config, tokenizer

from optimum_structprune import DomainConfig, Plan, RecoveryConfig, StructPruneConfig, StructPruner, write_report
from optimum_structprune.domains.manifest import Entry, Manifest
from optimum_structprune.errors import StructPruneError
from optimum_structprune.record.report import RecoveryReport, Report
from optimum_structprune.written import plain, to_json


SCHEMAS = {
    path.name.removesuffix(".schema.json"): json.loads(path.read_text(encoding="utf-8"))
    for path in files("optimum_structprune.saving").joinpath("schemas").iterdir()
}
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
    document = json.loads((saved[1] / f"{name}.json").read_text())
    check = Draft202012Validator(SCHEMAS[name]).validate
    check(document)
    assert document["format_version"] == 1
    check({field: value for field, value in document.items() if field != "format_version"})
    for wrong in ({**document, "format_version": 2}, {**document, "unheard_of": 1}):
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


def test_schemas_name_what_the_classes_have():
    config_schema, report = SCHEMAS["structprune_config"], SCHEMAS["report"]
    manifest = SCHEMAS["calibration_manifest"]
    for cls, schema, besides in (
        (StructPruneConfig, config_schema, {"format_version"}),
        (DomainConfig, config_schema["$defs"]["DomainConfig"], set()),
        (RecoveryConfig, config_schema["$defs"]["RecoveryConfig"], set()),
        (Manifest, manifest, {"format_version"}),
        (Entry, manifest["$defs"]["Entry"], set()),
        (Report, report, {"format_version", "sparsity"}),
        (RecoveryReport, report["$defs"]["RecoveryReport"], set()),
    ):
        assert set(schema["properties"]) == {field.name for field in fields(cls)} | besides, cls.__name__
        said = " ".join(cls.__doc__.split())
        for name, one in schema["properties"].items():
            assert one["description"] and (f" {name}: " not in said or one["description"] in said), (cls, name)


@pytest.mark.parametrize("name", LOADERS)
def test_files_of_a_later_version_are_refused(name, saved, tmp_path):
    document = json.loads((saved[1] / f"{name}.json").read_text())
    for version in (2, "1", 0, None):
        (tmp_path / f"{name}.json").write_text(json.dumps({**document, "format_version": version}))
        with pytest.raises(StructPruneError, match="format_version .* is not known here, where 1 is the latest"):
            LOADERS[name](tmp_path)


RECORDS = "report structprune_config calibration_manifest recovery_report recovery_config evaluation speed"


@pytest.mark.parametrize("name", RECORDS.split())
def test_a_page_says_which_record_is_of_a_later_version(name, tmp_path):
    (tmp_path / "report.json").write_text("{}")
    (tmp_path / f"{name}.json").write_text('{"format_version": 99}')
    with pytest.raises(StructPruneError, match=f"{name}.json: format_version 99 is not known here"):
        write_report(tmp_path)


leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.frozensets(st.text())
values = st.recursive(leaves, lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.integers(), inner))
strict = partial(json.loads, parse_constant=pytest.fail)  # who knows no `NaN` and no `Infinity`


@settings(max_examples=40)
@given(values)
def test_every_value_becomes_json_that_stays_as_it_is(value):
    document = to_json(value)
    assert strict(document) == plain(value) and to_json(strict(document)) == document


def test_reports_write_null_for_what_is_no_number(tmp_path):
    shape = {"proposed_by": "one width", "widths": {"mlp": 8}, "predicted_loss": nan, "loss": 1.5}
    sizes = {"before": 4, "after": 2}
    report = Report("llama", "obs", layer_parameters=sizes, parameters=sizes, shapes=[shape])
    report.recovery = RecoveryReport(perplexity={"a": {"pruned": 2.0, "recovered": nan}})
    report.save(tmp_path / "report.json")
    read = strict((tmp_path / "report.json").read_text())
    assert read["shapes"][0]["predicted_loss"] is None and read["shapes"][0]["loss"] == 1.5
    assert read["recovery"]["perplexity"]["a"] == {"pruned": 2.0, "recovered": None}
    Draft202012Validator(SCHEMAS["report"]).validate(read)  # with all that a training notes
