"""`structprune evaluate`: what it shows of several models, and what it refuses before one is loaded."""

import gc
import json
import weakref

import pytest
import torch
from helpers import save_with_tokenizer, write_texts
from models import build, config, documents, tokenizer

from optimum_structprune import DomainConfig, StructPruner, perplexity
from optimum_structprune.commands import loading
from optimum_structprune.commands.cli import main
from optimum_structprune.commands.loading import Loading
from optimum_structprune.commands.measure import names_of
from optimum_structprune.evaluation.heldout import read_heldout
from optimum_structprune.system.stages import model_bytes


SHORT = ["--speed", "--prompt", "8", "--new-tokens", "2", "--repeats", "2", "--device", "cpu"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("measure")
    dense = build("llama-tied")
    save_with_tokenizer(dense, folder / "dense")
    small = StructPruner(config(widths={"mlp": [14, 24]})).prune_model(dense, tokenizer())
    save_with_tokenizer(small, folder / "small")
    write_texts(folder / "a.jsonl", documents(40))
    questions = [{"prompt": f"w{number} w4", "right": "(?!)"} for number in range(6, 9)]
    questions.insert(0, {"messages": [{"role": "user", "content": "w5 w4"}], "right": ""})
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, questions)))
    return folder


def test_models_side_by_side(folder, capsys):
    models = [str(folder / name) for name in ("dense", "small")]
    text = ["--domain", f"a={folder / 'a.jsonl'}", "--seq-length", "24", "--answers"]
    text += [str(folder / "questions.jsonl"), "--max-new-tokens", "3"]
    files = ["--json", str(folder / "c.json")]
    for more in ([], ["--overwrite"]):
        assert main(["evaluate", *models, *text, *files, "--device", "cpu", *more]) == 0
    shown = capsys.readouterr().out
    found = json.loads((folder / "c.json").read_text())
    for name in ("dense", "small"):
        model = Loading().model(str(folder / name))
        measured = found["models"][name]
        assert measured["size"]["parameters"] == model.num_parameters()
        assert measured["widths"]["mlp"] == [layer.mlp.down_proj.in_features for layer in model.model.layers]
        heads = sum(layer.self_attn.k_proj.out_features for layer in model.model.layers)
        assert measured["size"]["cache_per_token"] == 2 * 4 * heads
        questions = measured["evaluation"]["answers"]["questions"]
        assert [item["answers"]["pruned"]["right"] for item in questions] == [True, False, False, False]
        assert f"{model.num_parameters():,}" in shown
    samples = read_heldout(DomainConfig(name="a", source=str(folder / "a.jsonl")), tokenizer(), 24).samples
    dense = found["models"]["dense"]["evaluation"]["domains"]["a"]["perplexity"]["pruned"]
    assert dense == pytest.approx(perplexity(build("llama-tied"), samples), rel=1e-4)
    assert "1 of 4" in shown


def test_a_dense_folder_without_a_tokenizer_is_read_with_that_of_the_model(folder, caplog):
    build("llama-tied").save_pretrained(folder / "bare")
    text = ["--domain", f"a={folder / 'a.jsonl'}", "--seq-length", "24", "--device", "cpu"]
    assert main(["evaluate", str(folder / "small"), "--against", str(folder / "bare"), *text]) == 0
    assert (
        "bare' cannot be loaded" in caplog.text and "The tokenizer of the compared model reads the text" in caplog.text
    )


def test_several_models_against_the_dense_one(folder, capsys):
    """Each is compared with it: its own numbers are those of a model that is measured by itself."""
    models, text = [str(folder / "dense"), str(folder / "small")], ["--domain", f"a={folder / 'a.jsonl'}"]
    how = [*text, "--seq-length", "24", "--device", "cpu", "--quiet", "--json"]
    assert main(["evaluate", *models, "--against", models[0], *how]) == 0
    every = json.loads(capsys.readouterr().out)["models"]
    dense, twin, small = every
    assert "evaluation" not in every[dense]
    domains = {name: every[name]["evaluation"]["domains"]["a"] for name in (twin, small)}
    assert domains[twin]["perplexity"]["dense"] == domains[twin]["perplexity"]["pruned"]
    assert domains[twin]["divergence"]["pruned"] == pytest.approx(0, abs=1e-6)
    assert main(["evaluate", models[1], "--against", models[0], *how]) == 0
    found = json.loads(capsys.readouterr().out)["models"]
    assert [*found] == ["original", "pruned"]
    assert found["pruned"]["evaluation"]["domains"]["a"] == domains[small]
    assert domains[small]["divergence"]["pruned"] > 1e-3 and domains[small]["perplexity"]["margin"] > 0


def test_bytes_are_those_that_a_pruning_reports(tmp_path, capsys):
    save_with_tokenizer(build("bart"), tmp_path)  # with a bias that is a buffer
    assert main(["evaluate", str(tmp_path), "--device", "cpu", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["models"]["model"]["size"]["bytes"] == model_bytes(build("bart"))


def test_each_model_is_let_go_before_the_next_is_loaded(folder, monkeypatch):
    load, loaded = Loading.model, []

    def noted(self, name, scratch=None):
        gc.collect()
        assert not any(reference() for reference in loaded)
        loaded.append(weakref.ref(model := load(self, name, scratch)))
        return model

    monkeypatch.setattr(Loading, "model", noted)
    assert main(["evaluate", *(str(folder / name) for name in ("small", "dense", "small")), "--device", "cpu"]) == 0
    assert len(loaded) == 3


@pytest.mark.slow
def test_several_models_shapes_and_the_same_model_twice(folder, capsys):
    dense, other = str(folder / "dense"), str(folder / "small")
    line = ["evaluate", other, dense, "--against", dense, *SHORT, "--prompt", "4", "--batch-size", "3"]
    assert main([*line, "--dtype", "bfloat16", "--clock", "cpu", "--json", "--quiet"]) == 0
    values = json.loads(capsys.readouterr().out)
    names = [f"{dense} (1)", "small", f"{dense} (2)"]
    models, speed = values["models"], values["speed"]
    assert [*models] == names and speed["clock"] == "cpu"
    for stage in ("prefill", "decode"):
        assert [*speed[stage]] == ["batch 3, prompt 8", "batch 3, prompt 4"]
        assert all([*of] == names for of in speed[stage].values())
    assert names_of(["a/x", "b/x", "c"]) == ["a/x", "b/x", "c"], "by the ends of their paths, where these differ"
    assert names_of(["a/x", "a/x", "org/y"]) == ["a/x (1)", "a/x (2)", "y"]
    first, last = (models[name]["size"] for name in (names[0], names[2]))
    assert first["bytes"] == last["bytes"] == 2 * first["parameters"]


def test_a_clock_that_does_not_see_a_device_is_refused_before_a_model_is_loaded(folder, capsys, monkeypatch):
    monkeypatch.setattr(Loading, "model", None)
    monkeypatch.setattr(loading, "usable_device", lambda name: "cuda")
    assert main(["evaluate", str(folder / "dense"), str(folder / "small"), *SHORT[:-2], "--clock", "cpu"]) == 2
    assert "The clock 'cpu' does not measure the work of cuda. Choose 'wall'" in capsys.readouterr().err


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_memory_on_cuda_is_that_of_one_model(folder, capsys):
    line = ["evaluate", str(folder / "dense"), str(folder / "dense"), *SHORT[:-2], "--device", "cuda", "--json"]
    assert main(line) == 0
    values = json.loads(capsys.readouterr().out)
    one, two = (bytes for of in values["speed"]["run_memory"].values() for bytes in of.values())
    weights = next(iter(values["weights"].values()))
    assert "CUDA" in values["memory_is"] and weights < one < 100 * weights and one == two
