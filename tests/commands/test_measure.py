"""Test `structprune evaluate` on several models."""

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


SPEED = ["--speed", "--prompt", "8", "--new-tokens", "2", "--repeats", "2"]
CPU = ["--device", "cpu"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Save an original model, a pruned model, a text and questions."""
    folder = tmp_path_factory.mktemp("measure")
    original = build("llama-tied")
    save_with_tokenizer(original, folder / "original")
    small = StructPruner(config(widths={"mlp": [14, 24]})).prune_model(original, tokenizer())
    save_with_tokenizer(small, folder / "small")
    write_texts(folder / "a.jsonl", documents(40))

    # Every answer to the first question is right. No answer to another question is right.
    questions = [{"messages": [{"role": "user", "content": "w5 w4"}], "right": ""}]
    questions += [{"prompt": f"w{number} w4", "right": "(?!)"} for number in range(6, 9)]
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, questions)))
    return folder


def text_flags(folder):
    return ["--domain", f"a={folder / 'a.jsonl'}", "--seq-length", "24"]


def test_two_models_are_measured_in_one_run(folder, capsys):
    line = ["evaluate", str(folder / "original"), str(folder / "small"), "--json", str(folder / "c.json")]
    line += text_flags(folder) + CPU
    line += ["--answers", str(folder / "questions.jsonl"), "--max-new-tokens", "3"]

    assert main(line) == 0
    assert main(line + ["--overwrite"]) == 0

    printed = capsys.readouterr().out
    values = json.loads((folder / "c.json").read_text())
    for name in ("original", "small"):
        model = Loading().model(str(folder / name))
        measured = values["models"][name]
        assert measured["size"]["parameters"] == model.num_parameters()
        assert measured["widths"]["mlp"] == [layer.mlp.down_proj.in_features for layer in model.model.layers]
        heads = sum(layer.self_attn.k_proj.out_features for layer in model.model.layers)
        assert measured["size"]["cache_per_token"] == 2 * 4 * heads
        questions = measured["evaluation"]["answers"]["questions"]
        assert [item["answers"]["pruned"]["right"] for item in questions] == [True, False, False, False]
        assert f"{model.num_parameters():,}" in printed

    samples = read_heldout(DomainConfig(name="a", source=str(folder / "a.jsonl")), tokenizer(), 24).samples
    measured_perplexity = values["models"]["original"]["evaluation"]["domains"]["a"]["perplexity"]["pruned"]
    assert measured_perplexity == pytest.approx(perplexity(build("llama-tied"), samples), rel=1e-4)
    assert "1 of 4" in printed


def test_the_tokenizer_of_the_compared_model_replaces_a_missing_one(folder, caplog):
    build("llama-tied").save_pretrained(folder / "bare")
    line = ["evaluate", str(folder / "small"), "--against", str(folder / "bare")]

    assert main(line + text_flags(folder) + CPU) == 0

    assert "bare' cannot be loaded" in caplog.text
    assert "The tokenizer of the compared model reads the text" in caplog.text


def test_several_models_are_compared_with_the_original_one(folder, capsys):
    """Each model gets the same numbers as in a run of its own."""
    original_path = str(folder / "original")
    small_path = str(folder / "small")
    flags = ["--against", original_path, "--quiet", "--json"] + text_flags(folder) + CPU

    assert main(["evaluate", original_path, small_path] + flags) == 0
    models = json.loads(capsys.readouterr().out)["models"]
    original, twin, small = models
    assert "evaluation" not in models[original]
    twin_domain = models[twin]["evaluation"]["domains"]["a"]
    small_domain = models[small]["evaluation"]["domains"]["a"]
    assert twin_domain["perplexity"]["original"] == twin_domain["perplexity"]["pruned"]
    assert twin_domain["divergence"]["pruned"] == pytest.approx(0, abs=1e-6)

    assert main(["evaluate", small_path] + flags) == 0
    models = json.loads(capsys.readouterr().out)["models"]
    assert list(models) == ["original", "pruned"]
    assert models["pruned"]["evaluation"]["domains"]["a"] == small_domain
    assert small_domain["divergence"]["pruned"] > 1e-3
    assert small_domain["perplexity"]["margin"] > 0


def test_the_bytes_of_a_model_include_its_buffers(tmp_path, capsys):
    """BART has a bias that is a buffer."""
    save_with_tokenizer(build("bart"), tmp_path)

    assert main(["evaluate", str(tmp_path), "--json"] + CPU) == 0

    size = json.loads(capsys.readouterr().out)["models"]["model"]["size"]
    assert size["bytes"] == model_bytes(build("bart"))


def test_each_model_is_freed_before_the_next_one_is_loaded(folder, monkeypatch):
    load = Loading.model
    references = []

    def load_and_check(self, name, scratch=None):
        gc.collect()
        assert not any(reference() for reference in references)

        model = load(self, name, scratch)
        references.append(weakref.ref(model))
        return model

    monkeypatch.setattr(Loading, "model", load_and_check)
    models = [str(folder / name) for name in ("small", "original", "small")]
    assert main(["evaluate"] + models + CPU) == 0

    assert len(references) == 3


@pytest.mark.slow
def test_speeds_of_several_models_and_shapes(folder, capsys):
    original = str(folder / "original")
    line = ["evaluate", str(folder / "small"), original, "--against", original] + SPEED + CPU
    line += ["--prompt", "4", "--batch-size", "3", "--dtype", "bfloat16", "--clock", "cpu", "--json", "--quiet"]

    assert main(line) == 0

    values = json.loads(capsys.readouterr().out)
    models = values["models"]
    speed = values["speed"]
    names = [f"{original} (1)", "small", f"{original} (2)"]
    assert list(models) == names
    assert speed["clock"] == "cpu"
    for stage in ("prefill", "decode"):
        assert list(speed[stage]) == ["batch 3, prompt 8", "batch 3, prompt 4"]
        for speeds_by_model in speed[stage].values():
            assert list(speeds_by_model) == names

    first_size = models[names[0]]["size"]
    last_size = models[names[2]]["size"]
    assert first_size["bytes"] == 2 * first_size["parameters"]
    assert last_size["bytes"] == first_size["bytes"]


def test_models_are_named_by_the_ends_of_their_paths_where_these_differ():
    assert names_of(["a/x", "b/x", "c"]) == ["a/x", "b/x", "c"]
    assert names_of(["a/x", "a/x", "org/y"]) == ["a/x (1)", "a/x (2)", "y"]


def test_a_clock_that_cannot_time_the_device_is_refused_before_loading(folder, capsys, monkeypatch):
    monkeypatch.setattr(Loading, "model", None)
    monkeypatch.setattr(loading, "usable_device", lambda name: "cuda")
    line = ["evaluate", str(folder / "original"), str(folder / "small"), "--clock", "cpu"]

    assert main(line + SPEED) == 2

    assert "The clock 'cpu' does not measure the work of cuda. Choose 'wall'" in capsys.readouterr().err


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_memory_on_cuda_is_measured_for_each_model(folder, capsys):
    original = str(folder / "original")
    line = ["evaluate", original, original, "--device", "cuda", "--json"]

    assert main(line + SPEED) == 0

    values = json.loads(capsys.readouterr().out)
    run_memory = []
    for memory_by_model in values["speed"]["run_memory"].values():
        run_memory += memory_by_model.values()
    first, second = run_memory
    weights = next(iter(values["weights"].values()))
    assert "CUDA" in values["memory_is"]
    assert weights < first < 100 * weights
    assert first == second
