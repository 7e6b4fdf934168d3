"""`structprune benchmark`: its names, its result, and what it refuses before a model is loaded."""

import json

import pytest
import torch
from helpers import save_with_tokenizer
from models import build

from optimum_structprune.commands import loading
from optimum_structprune.commands.cli import main
from optimum_structprune.commands.measure import names_of


SHORT = ["--prompt", "8", "--new-tokens", "2", "--repeats", "2", "--device", "cpu"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmark")
    for name, case in (("dense", "llama-tied"), ("other", "llama-untied"), ("bert", "bert")):
        save_with_tokenizer(build(case), folder / name)
    return folder


def test_models_are_named_by_the_ends_of_their_paths():
    assert names_of(["a/dense", "b/small"]) == ["dense", "small"]
    assert names_of(["a/x", "b/x", "c"]) == ["a/x", "b/x", "c"]
    assert names_of(["a/x", "a/x", "org/y"]) == ["a/x (1)", "a/x (2)", "y"]


def test_several_models_shapes_and_the_same_model_twice(folder, capsys):
    dense, other = str(folder / "dense"), str(folder / "other")
    line = ["benchmark", dense, other, dense, *SHORT, "--prompt", "4", "--batch-size", "1", "--batch-size", "3"]
    assert main([*line, "--dtype", "bfloat16", "--threads", "1", "--clock", "cpu", "--json", "--quiet"]) == 0
    values = json.loads(capsys.readouterr().out)
    names = [f"{dense} (1)", "other", f"{dense} (2)"]
    assert [*values["models"]] == names and values["threads"] == 1 and values["clock"] == "cpu"
    assert [(one["batch_size"], one["prompt"], one["model"]) for one in values["measurements"]] == [
        (batch_size, prompt, name) for batch_size in (1, 3) for prompt in (8, 4) for name in names
    ]
    first, *_, twin = values["models"].values()
    assert first == twin and first["dtype"] == "bfloat16"
    assert first["files"] == (folder / "dense" / "model.safetensors").stat().st_size


def test_a_model_needs_no_tokenizer(tmp_path, folder, capsys):
    build("llama-tied").save_pretrained(tmp_path)
    assert main(["benchmark", str(folder / "dense"), str(tmp_path), *SHORT]) == 0
    assert "speed-up: the time of dense over the model's" in capsys.readouterr().out


@pytest.mark.parametrize(("models", "flags", "message"), [
    (["dense", "nowhere"], [], "nowhere"),
    (["dense", "bert"], [], "bert is a BertForMaskedLM, which does not predict the next token"),
    (["dense", "other"], ["--dtype", "int3"], "--dtype int3 is not known"),
    (["dense", "other"], ["--prompt", "63"], "take 65 positions, and dense has 64: the longest prompt is 62"),
    (["dense", "other"], ["--batch-size", "0"], "batch_size has to be 1 or more, got 0"),
    (["dense", "other"], ["--clock", "sun"], "There is no clock 'sun'; choose one of wall, cpu"),
    (["dense", "other"], ["--device", "auto"], "--device auto spreads a model"),
    (["dense", "other"], ["--device", "nothing"], "--device nothing cannot be used"),
])  # fmt: skip
def test_mistakes_are_refused_before_a_model_is_loaded(models, flags, message, folder, capsys, monkeypatch):
    monkeypatch.setattr(loading.Loading, "model", lambda *_: pytest.fail("a model is loaded"))
    assert main(["benchmark", *(str(folder / name) for name in models), *SHORT, *flags]) == 2
    line, *more = capsys.readouterr().err.splitlines()
    assert message in line and not more


def test_the_clock_of_the_processor_does_not_see_an_accelerator(folder, capsys, monkeypatch):
    monkeypatch.setattr(loading, "usable_device", lambda name: "cuda")
    line = ["benchmark", str(folder / "dense"), str(folder / "other"), *SHORT[:-2], "--clock", "cpu"]
    assert main(line) == 2
    assert "The clock 'cpu' does not see what cuda does; choose 'wall'" in capsys.readouterr().err


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_memory_on_cuda_is_that_of_one_model(folder, capsys):
    line = ["benchmark", str(folder / "dense"), str(folder / "dense"), *SHORT[:-2], "--device", "cuda", "--json"]
    assert main(line) == 0
    values = json.loads(capsys.readouterr().out)
    one, two = (measured["memory"] for measured in values["measurements"])
    weights = next(iter(values["models"].values()))["weights"]
    assert "CUDA" in values["memory_is"] and weights < one < 100 * weights and one == two
