"""The files of a result name no folders of the machine, so that they can be published."""

import json

import pytest
from helpers import contents, write_texts
from models import build, config, documents, tokenizer
from transformers import AutoModelForCausalLM

from optimum_structprune import DomainConfig, StructPruneConfig, StructPruner, write_report
from optimum_structprune.system.written import without_folders


def test_files_of_a_result_do_not_name_folders_of_this_machine(tmp_path, monkeypatch):
    home = tmp_path / "home"
    (home / "texts").mkdir(parents=True)
    write_texts(home / "near.jsonl", documents(60))
    write_texts(home / "texts" / "far.jsonl", documents(60))
    (home / "keep.txt").write_text("w5\n")
    build("llama-tied").save_pretrained(home / "original")
    monkeypatch.chdir(home)

    domains = [DomainConfig("a", "near.jsonl"), DomainConfig("b", str(home / "texts" / "far.jsonl"))]
    pruner = StructPruner(config(domains=domains, keep_tokens=str(home / "keep.txt")))
    original = AutoModelForCausalLM.from_pretrained(home / "original")
    pruner.save(pruner.prune_model(original, tokenizer()), home / "out", tokenizer())

    manifest = json.loads((home / "out" / "calibration_manifest.json").read_text())
    sources = [entry["origin"]["source"] for entry in manifest["domains"] if entry["origin"]]
    assert sources == ["near.jsonl", "far.jsonl"]
    saved_config = StructPruneConfig.from_pretrained(home / "out")
    assert [domain.source for domain in saved_config.domains] == sources
    assert saved_config.keep_tokens == "keep.txt"

    write_report(home / "out")
    files = contents(home / "out")
    assert {"report.html", "README.md", "structprune_config.json"} <= set(files)
    for name, content in files.items():
        assert str(tmp_path).encode() not in content, name
    assert b"far.jsonl" in files["README.md"]
    assert b"near.jsonl" in files["README.md"]


@pytest.mark.parametrize(("value", "expected"), [
    ("/tmp/a/b.jsonl", "b.jsonl"), ("/tmp/a/*.jsonl", "*.jsonl"), ("preset:/tmp/a.yaml#mine", "preset:a.yaml#mine"),
    ("a/b.jsonl", "a/b.jsonl"), ("owner/name", "owner/name"), ("/[a-z]+/x", "/[a-z]+/x"), ("self:code", "self:code"),
    ({"a": ["/tmp/x/y", 1, None]}, {"a": ["y", 1, None]}),
])  # fmt: skip
def test_absolute_paths_become_names(value, expected):
    assert without_folders(value) == expected
