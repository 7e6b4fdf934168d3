"""Tasks of MTEB: the scores are those of its package, and the command shows them of each model."""

import json
import sys
from types import SimpleNamespace

import pytest
from helpers import error_line, save_with_tokenizer
from models import build, config, tokenizer

from optimum_structprune import StructPruner
from optimum_structprune.commands.cli import main
from optimum_structprune.evaluation.tasks import check_tasks, task_scores


def test_without_the_package_one_line_says_how_to_get_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "mteb", None)
    monkeypatch.setattr("optimum_structprune.evaluation.tasks.find_spec", lambda name: None)
    build("bert").save_pretrained(tmp_path / "bert")
    assert main(["evaluate", str(tmp_path / "bert"), "--mteb", "STS12", "--device", "cpu"]) == 2
    assert "pip install mteb sentence-transformers" in error_line(capsys)


def test_scores_stand_in_the_table_by_model_and_task(tmp_path, capsys, monkeypatch):
    """Stand-ins for the packages give scores that tell the folder, so that neither they nor the Hub are needed."""
    folders = {name: str(tmp_path / name) for name in ("dense", "slim")}
    save_with_tokenizer(build("bert"), folders["dense"])
    pruner = StructPruner(config())
    pruner.save(pruner.prune_model(build("bert"), tokenizer()), folders["slim"], tokenizer())

    def evaluate(encoder, tasks, cache):
        score = len(encoder.path) + len(tasks)
        return SimpleNamespace(task_results=[SimpleNamespace(task_name=t, get_score=lambda: score) for t in tasks])

    def get_tasks(tasks):
        if unknown := {*tasks} - {"STS12", "SciFact"}:
            raise KeyError(f"KeyError: {unknown} not found")
        return tasks

    encoder = SimpleNamespace(SentenceTransformer=lambda path, **options: SimpleNamespace(path=path, **options))
    monkeypatch.setitem(sys.modules, "mteb", SimpleNamespace(evaluate=evaluate, get_tasks=get_tasks))
    monkeypatch.setitem(sys.modules, "sentence_transformers", encoder)
    monkeypatch.setattr("optimum_structprune.evaluation.tasks.find_spec", lambda name: name)
    command = ["evaluate", folders["slim"], "--against", folders["dense"], "--device", "cpu", "--mteb"]
    assert main([*command, "STS12", "--mteb", "SciFact", "--json"]) == 0
    expected = {"original": len(folders["dense"]) + 2, "pruned": len(folders["slim"]) + 2}
    models = json.loads(capsys.readouterr().out)["models"]
    for task in ("STS12", "SciFact"):
        assert {name: model["tasks"][task] for name, model in models.items()} == expected
    for page in ([], ["--html"]):
        assert main([*command, "STS12", *page]) == 0
        assert "MTEB STS12" in capsys.readouterr().out
    assert main([*command, "STS99"]) == 2
    assert "STS99" in error_line(capsys)


@pytest.mark.nightly
def test_a_task_is_run_by_the_package_itself(tmp_path, monkeypatch):
    mteb, _ = pytest.importorskip("mteb"), pytest.importorskip("sentence_transformers")
    datasets = pytest.importorskip("datasets")
    pairs = {"sentence1": ["w1 w2 w3", "w4 w5", "w6"], "sentence2": ["w1 w2 w3", "w5 w4", "w9 w9"]}

    class Local(type(mteb.get_tasks(tasks=["STS12"])[0])):
        def load_data(self, **options):
            self.dataset = {"test": datasets.Dataset.from_dict({**pairs, "score": [5.0, 3.0, 0.0]})}
            self.data_loaded = True

    monkeypatch.setattr(mteb, "get_tasks", lambda tasks: [Local()])
    save_with_tokenizer(build("bert"), tmp_path / "bert")
    check_tasks(["STS12"])
    assert -1 <= task_scores({"model": str(tmp_path / "bert")}, ["STS12"], "cpu")["STS12"]["model"] <= 1
