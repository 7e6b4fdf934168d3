"""`structprune compare`: its table, its files, and what it refuses before a model is loaded."""

import csv
import json

import pytest
from helpers import save_with_tokenizer
from models import build, config, documents, tokenizer

from optimum_structprune import DomainConfig, StructPruner, perplexity
from optimum_structprune.commands import measure
from optimum_structprune.commands.cli import main
from optimum_structprune.commands.loading import Loading
from optimum_structprune.evaluation.heldout import read_heldout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    dense = build("llama-tied")
    save_with_tokenizer(dense, folder / "dense")
    small = StructPruner(config(sparsity=0.3, allocation="global", round_to=1)).prune_model(dense, tokenizer())
    save_with_tokenizer(small, folder / "small")
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents(40)))
    items = [{"query": "w3 w4", "choices": ["w5", "w6"], "gold": number % 2} for number in range(4)]
    (folder / "task.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    return folder


def test_models_side_by_side(folder, capsys):
    models = [str(folder / name) for name in ("dense", "small")]
    text = ["--domain", f"a={folder / 'a.jsonl'}", "--seq-length", "24", "--task", str(folder / "task.jsonl")]
    files = ["--csv", str(folder / "c.csv"), "--json", str(folder / "c.json")]
    for _ in range(2):  # a result replaces a result
        assert main(["compare", *models, *text, *files, "--device", "cpu"]) == 0
    shown = capsys.readouterr().out
    found = json.loads((folder / "c.json").read_text())["models"]
    rows = {row["model"]: row for row in csv.DictReader((folder / "c.csv").open())}
    for name in ("dense", "small"):
        model = Loading().model(str(folder / name))
        assert found[name]["parameters"] == int(rows[name]["parameters"]) == model.num_parameters()
        widths = [layer.mlp.down_proj.in_features for layer in model.model.layers]
        assert found[name]["widths"]["mlp"] == widths
        heads = sum(layer.self_attn.k_proj.out_features for layer in model.model.layers)
        assert found[name]["cache_per_token"] == 2 * 4 * heads
        assert found[name]["tasks"]["task"]["items"] == 4
        assert f"{model.num_parameters():,}" in shown
    samples = read_heldout(DomainConfig(name="a", source=str(folder / "a.jsonl")), tokenizer(), 24).samples
    assert float(rows["dense"]["perplexity a"]) == pytest.approx(perplexity(build("llama-tied"), samples), rel=1e-4)


def test_speed_is_measured_where_it_is_asked_for(folder, capsys, monkeypatch):
    monkeypatch.setattr(measure, "PROMPTS", [8])
    assert main(["compare", str(folder / "dense"), "--speed", "--json", "--quiet", "--device", "cpu"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["models"]["dense"]["read"] > 0 and "a prompt of 8 tokens" in values["notes"][0]


@pytest.mark.parametrize(("line", "message"), [
    (["--csv", "/nowhere/x.csv"], "there is no folder /nowhere"),
    (["--csv", "dense/config.json"], "config.json is no result of structprune, so it is not replaced"),
    (["--json", "dense/config.json"], "config.json is no result of structprune, so it is not replaced"),
    (["--dtype", "float8"], "--dtype float8 is not known"),
    (["/nowhere/model"], "/nowhere/model"),
])  # fmt: skip
def test_what_cannot_be_compared_is_refused_before_a_model_is_loaded(folder, line, message, capsys, monkeypatch):
    monkeypatch.setattr(Loading, "model", lambda *_: pytest.fail("a model is loaded"))
    monkeypatch.chdir(folder)
    assert main(["compare", str(folder / "dense"), *line]) == 2
    assert message in capsys.readouterr().err
