"""`examples/tools/sweep.py` prunes to several sizes, writes a curve, and resumes."""

import json

import pytest
import sweep
from helpers import error_line, save_desk, save_with_tokenizer, write_texts
from models import build, documents
from sweep import main
from transformers import AutoModelForCausalLM

from optimum_structprune.pruner import StructPruner


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_desk(tmp_path_factory.mktemp("sweep"))


def arguments_of(folder, out, *sizes, flags=()):
    """Return the arguments of a sweep over sizes with short text."""
    arguments = [str(folder / "model"), str(folder / out), "--sparsity", *sizes]
    arguments += ["--domain", f"a={folder / 'a.jsonl'}", "--num-samples", "6", "--seq-length", "24"]
    arguments += ["--round-to", "1", "--device", "cpu", "--quiet"]
    return arguments + list(flags)


def test_every_size_has_a_model_and_a_point_on_the_curve(folder, capsys, monkeypatch):
    prune_model = StructPruner.prune_model
    sizes = []

    def prune_and_interrupt_once(self, *args, **kwargs):
        sizes.append(self.config.sparsity)
        if len(sizes) == 2:
            raise KeyboardInterrupt
        return prune_model(self, *args, **kwargs)

    monkeypatch.setattr(StructPruner, "prune_model", prune_and_interrupt_once)
    arguments = arguments_of(folder, "out", "0.3", "0.1", flags=["--json", "--allocation", "sensitivity"])
    assert main(arguments) == 130
    assert main(arguments) == 0
    assert sizes == [0.1, 0.3, 0.3], "the second sweep prunes only to the size that is missing"

    out = folder / "out"
    values = json.loads(capsys.readouterr().out)["parameters"]
    curve = json.loads((out / "curve.json").read_text())
    assert list(values) == list(curve["parameters"]) == ["original", "0.1", "0.3"]
    assert len(list((out / "losses").iterdir())) == 1

    for size in ("0.1", "0.3"):
        small = AutoModelForCausalLM.from_pretrained(out / f"sparsity-{size}")
        assert curve["parameters"][size] == small.num_parameters() == values[size]
        report = json.loads((out / f"sparsity-{size}" / "report.json").read_text())
        perplexity = report["domains"]["a"]["perplexity"]
        assert curve["perplexity"]["a"]["original"] == pytest.approx(perplexity["original"])
        assert curve["perplexity"]["a"][size] == pytest.approx(perplexity["pruned"])


def test_a_sweep_without_models_names_sizes_with_the_same_widths(folder, capsys):
    assert main(arguments_of(folder, "curve", "0.2", "0.21", flags=["--no-save", "--round-to", "8"])) == 0
    assert {path.name for path in (folder / "curve").iterdir()} == {"size.json", "curve.json"}
    assert "sparsity 0.2 and 0.21 come to the same widths" in capsys.readouterr().out


def save_inputs(folder, model_seed=0, text_seed=0):
    """Save a model and a text."""
    save_with_tokenizer(build("llama-tied", model_seed), folder / "model")
    write_texts(folder / "a.jsonl", documents(80, text_seed))


def test_a_sweep_resumes_only_with_the_same_model_text_and_settings(tmp_path, capsys):
    save_inputs(tmp_path)
    arguments = arguments_of(tmp_path, "out", "0.1", flags=["--no-save"])
    assert main(arguments) == 0
    curve = tmp_path / "out" / "curve.json"
    text = curve.read_text()
    curve.unlink()  # As if the process ended before it wrote the curve.
    assert main(arguments) == 0
    assert curve.read_text() == text

    arguments = arguments_of(tmp_path, "out", "0.1", "0.3", flags=["--no-save"])
    changes = [({}, ["--error-feedback", "0.25"]), ({"model_seed": 1}, []), ({"text_seed": 1}, [])]
    for seeds, flags in changes:
        save_inputs(tmp_path, **seeds)
        capsys.readouterr()
        assert main(arguments + flags) == 2
        assert "contains size 1 of a run with another model, config or calibration text" in capsys.readouterr().err
        assert curve.read_text() == text


@pytest.mark.parametrize("value", [5, {"odd": 1}], ids=str)
def test_a_damaged_state_of_a_sweep_is_refused(tmp_path, capsys, value):
    save_inputs(tmp_path)
    arguments = arguments_of(tmp_path, "out", "0.1", flags=["--no-save"])
    assert main(arguments) == 0

    path = tmp_path / "out" / "size.json"
    state = json.loads(path.read_text())
    state["values"] = {"0.1": value}
    path.write_text(json.dumps(state))
    capsys.readouterr()
    assert main(arguments) == 2
    assert "size.json is not a readable checkpoint" in error_line(capsys)


def test_impossible_sizes_and_folders_are_refused_before_pruning(folder, capsys, monkeypatch):
    monkeypatch.setattr(sweep, "_pruned", None)
    for size, message in (("1.5", "must be greater than 0 and less than 1"), ("0.99", "sparsity=0.99 is too large")):
        assert main(arguments_of(folder, "refused", "0.1", size)) == 2
        assert message in error_line(capsys)
        assert not (folder / "refused").exists()

    assert main(arguments_of(folder, "model", "0.1")) == 2
    assert "holds something else than a sweep" in capsys.readouterr().err
