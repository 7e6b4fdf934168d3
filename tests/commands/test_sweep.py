"""`structprune sweep`: the curve, what lies beside it, and that it goes on."""

import csv
import json

import pytest
from helpers import save_with_tokenizer
from models import build, documents
from transformers import AutoModelForCausalLM

from optimum_structprune.commands import sweep
from optimum_structprune.commands.cli import main
from optimum_structprune.pruner import StructPruner


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    save_with_tokenizer(build("llama-tied"), folder / "model")
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents(80)))
    return folder


def line(folder, out, *sizes, more=()):
    how = ["--num-samples", "6", "--seq-length", "24", "--round-to", "1", "--device", "cpu", "--quiet", "--json"]
    domain = ["--domain", f"a={folder / 'a.jsonl'}"]
    return ["sweep", str(folder / "model"), str(folder / out), "--sparsity", *sizes, *domain, *how, *more]


def test_every_size_is_a_model_and_a_point(folder, capsys, monkeypatch):
    prune, sizes = StructPruner.prune_model, []

    def counted(self, *args, **kwargs):
        sizes.append(self.config.sparsity)
        if len(sizes) == 2:
            raise KeyboardInterrupt
        return prune(self, *args, **kwargs)

    monkeypatch.setattr(StructPruner, "prune_model", counted)
    more = ["--allocation", "search"]
    assert main(line(folder, "out", "0.3", "0.1", more=more)) == 130
    assert main(line(folder, "out", "0.3", "0.1", more=more)) == 0
    assert sizes == [0.1, 0.3, 0.3]  # what was there is not done again
    out = folder / "out"
    values = json.loads(capsys.readouterr().out)
    assert [size["sparsity"] for size in values["sizes"]] == [0.1, 0.3]
    rows = [*csv.DictReader((out / "curve.csv").open())]
    for row, size in zip(rows, values["sizes"], strict=True):
        small = AutoModelForCausalLM.from_pretrained(out / f"sparsity-{size['sparsity']:g}")
        assert int(row["parameters"]) == small.num_parameters() == size["parameters"]
        assert float(row["a after"]) == pytest.approx(size["loss"]["a"]["after"])
    assert "perplexity" in (out / "curve.svg").read_text() and len([*(out / "losses").iterdir()]) == 1


def test_only_the_curve(folder, capsys):
    assert main(line(folder, "bare", "0.2", more=["--no-save"])) == 0
    assert {path.name for path in (folder / "bare").iterdir()} == {"curve.json", "curve.csv", "curve.svg"}
    capsys.readouterr()
    assert main(line(folder, "bare", "0.3", more=["--no-save", "--damping", "0.5"])) == 2
    assert "holds a sweep with another damping" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("sizes", "more", "message"),
    [
        (["0.1", "1.5"], [], "has to lie between 0 and 1"),
        (["0.1", "0.99"], [], "sparsity=0.99 is more than"),
        (["0.1"], ["--allocation", "sideways"], "allocation"),
        (["0.1"], ["--stats", "nowhere"], "holds no statistics"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_runs(folder, capsys, monkeypatch, sizes, more, message):
    def refused(*args):
        raise AssertionError("a size was pruned")

    monkeypatch.setattr(sweep, "_pruned", refused)
    assert main(line(folder, "refused", *sizes, more=more)) == 2
    assert message in capsys.readouterr().err and not (folder / "refused").exists()


def test_a_folder_of_something_else_is_left_alone(folder, capsys):
    assert main(line(folder, "model", "0.1")) == 2
    assert "holds something else than a sweep" in capsys.readouterr().err
