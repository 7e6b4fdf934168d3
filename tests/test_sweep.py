"""`examples/tools/sweep.py`: the curve, what lies beside it, and that it goes on."""

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


def line(folder, out, *sizes, more=()):
    how = ["--num-samples", "6", "--seq-length", "24", "--round-to", "1", "--device", "cpu", "--quiet", "--json"]
    domain = ["--domain", f"a={folder / 'a.jsonl'}"]
    return [str(folder / "model"), str(folder / out), "--sparsity", *sizes, *domain, *how, *more]


def test_every_size_is_a_model_and_a_point(folder, capsys, monkeypatch):
    prune, sizes = StructPruner.prune_model, []

    def counted(self, *args, **kwargs):
        sizes.append(self.config.sparsity)
        if len(sizes) == 2:
            raise KeyboardInterrupt
        return prune(self, *args, **kwargs)

    monkeypatch.setattr(StructPruner, "prune_model", counted)
    more = ["--allocation", "sensitivity"]
    assert main(line(folder, "out", "0.3", "0.1", more=more)) == 130
    assert main(line(folder, "out", "0.3", "0.1", more=more)) == 0
    assert sizes == [0.1, 0.3, 0.3]  # what was there is not done again
    out = folder / "out"
    values = json.loads(capsys.readouterr().out)["parameters"]
    curve = json.loads((out / "curve.json").read_text())
    assert [*values] == [*curve["parameters"]] == ["dense", "0.1", "0.3"] and len([*(out / "losses").iterdir()]) == 1
    for size in ("0.1", "0.3"):
        small = AutoModelForCausalLM.from_pretrained(out / f"sparsity-{size}")
        report = json.loads((out / f"sparsity-{size}" / "report.json").read_text())
        assert curve["parameters"][size] == small.num_parameters() == values[size]
        for name, when in (("dense", "dense"), (size, "pruned")):
            assert curve["perplexity"]["a"][name] == pytest.approx(report["domains"]["a"]["perplexity"][when])


def test_only_the_curve_and_sizes_that_coincide(folder, capsys):
    short = ["--no-save", "--round-to", "8"]
    assert main([word for word in line(folder, "bare", "0.2", "0.21", more=short) if word != "--json"]) == 0
    assert {path.name for path in (folder / "bare").iterdir()} == {"size.json", "curve.json"}
    assert "sparsity 0.2 and 0.21 come to the same widths" in capsys.readouterr().out


def test_a_sweep_goes_on_with_the_same_model_text_and_settings_alone(tmp_path, capsys):
    def written(seed=0, text=0):
        save_with_tokenizer(build("llama-tied", seed), tmp_path / "model")
        write_texts(tmp_path / "a.jsonl", documents(80, text))

    written()
    assert main(line(tmp_path, "out", "0.1", more=["--no-save"])) == 0
    curve = (tmp_path / "out" / "curve.json").read_text()
    (tmp_path / "out" / "curve.json").unlink()  # it was killed before it wrote it
    assert main(line(tmp_path, "out", "0.1", more=["--no-save"])) == 0
    for changed, flags in (({}, ["--error-feedback", "0.25"]), ({"seed": 1}, []), ({"text": 1}, [])):
        written(**changed)
        capsys.readouterr()
        assert main(line(tmp_path, "out", "0.1", "0.3", more=["--no-save", *flags])) == 2
        assert "contains size 1 of a run with another model, config or calibration text" in capsys.readouterr().err
        assert (tmp_path / "out" / "curve.json").read_text() == curve
    written()
    state = tmp_path / "out" / "size.json"
    for damaged in (5, {"odd": 1}):
        state.write_text(json.dumps({**json.loads(state.read_text()), "values": {"0.1": damaged}}))
        capsys.readouterr()
        assert main(line(tmp_path, "out", "0.1", more=["--no-save"])) == 2
        assert "size.json is not a readable checkpoint" in error_line(capsys)


def test_what_cannot_be_done_is_refused_before_anything_runs(folder, capsys, monkeypatch):
    monkeypatch.setattr(sweep, "_pruned", None)
    for size, message in (("1.5", "must be greater than 0 and less than 1"), ("0.99", "sparsity=0.99 is too large")):
        assert main(line(folder, "refused", "0.1", size)) == 2
        assert message in error_line(capsys) and not (folder / "refused").exists()
    assert main(line(folder, "model", "0.1")) == 2
    assert "holds something else than a sweep" in capsys.readouterr().err
