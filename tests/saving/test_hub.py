"""A folder appears only when it is whole, and what was there survives a failure."""

import json

import pytest
import torch
from models import build, config, full_disk, token_ids, tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_structprune import Plan, StructPruneConfig, StructPruneError, StructPruner
from optimum_structprune.saving import hub


@pytest.fixture(scope="module")
def run():
    pruner = StructPruner(config())
    return pruner, pruner.prune_model(build("llama-tied"), tokenizer())


def test_everything_is_saved(run, tmp_path):
    pruner, model = run
    model.generation_config.max_new_tokens = 7
    pruner.save(model, tmp_path / "deep" / "out", tokenizer=tokenizer())
    out = tmp_path / "deep" / "out"
    assert {path.name for path in out.iterdir()} >= {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "pruning_plan.json",
        "report.json",
        "structprune_config.json",
        "tokenizer.json",
    }
    assert Plan.load(out / "pruning_plan.json") == pruner.plan
    assert StructPruneConfig.from_pretrained(out).widths == {"mlp": 24}
    assert json.loads((out / "report.json").read_text())["parameters"]["after"] == model.num_parameters()
    again = AutoModelForCausalLM.from_pretrained(out)
    assert again.generation_config.max_new_tokens == 7
    assert again.get_input_embeddings().weight is again.get_output_embeddings().weight
    assert AutoTokenizer.from_pretrained(out)("w5 w6", add_special_tokens=False)["input_ids"] == [5, 6]
    with torch.no_grad():
        torch.testing.assert_close(again(token_ids()).logits, model(token_ids()).logits)
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_an_existing_folder_is_refused_and_overwritten_on_request(run, tmp_path):
    pruner, model = run
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").write_text("mine")
    with pytest.raises(StructPruneError, match="out exists and is not empty"):
        pruner.save(model, tmp_path / "out")
    assert (tmp_path / "out" / "precious.txt").read_text() == "mine"
    pruner.save(model, tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "precious.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_file_in_the_way_is_refused(run, tmp_path):
    pruner, model = run
    (tmp_path / "out").write_text("")
    with pytest.raises(StructPruneError, match="is a file"):
        pruner.save(model, tmp_path / "out", overwrite=True)


@pytest.mark.parametrize("step", ["check_reload", "_swap"])
def test_a_failure_leaves_what_was_there(run, tmp_path, monkeypatch, step):
    pruner, model = run
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").write_text("mine")

    def fail(*args):
        raise OSError("no space left on device")

    monkeypatch.setattr(hub, step, fail)
    with pytest.raises(StructPruneError, match="out could not be written, and what was there is as it was: no space"):
        pruner.save(model, tmp_path / "out", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "precious.txt").read_text() == "mine"


def test_a_full_disk_leaves_what_was_there(run, tmp_path):
    pruner, model = run
    pruner.save(model, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with full_disk(20_000), pytest.raises(StructPruneError, match="out could not be written.*too large"):
        pruner.save(model, tmp_path / "out", overwrite=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_model_that_comes_back_different_is_not_saved(run, tmp_path, monkeypatch):
    pruner, model = run
    original = type(model).save_pretrained

    def damaged(self, folder):
        with torch.no_grad():
            weight = self.model.layers[0].mlp.down_proj.weight
            weight.mul_(2)
            original(self, folder)
            weight.div_(2)

    monkeypatch.setattr(type(model), "save_pretrained", damaged)
    with pytest.raises(StructPruneError, match="gives other outputs"):
        pruner.save(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_saving_before_pruning_is_refused(tmp_path):
    with pytest.raises(StructPruneError, match="call prune_model first"):
        StructPruner(config()).save(build("llama-tied"), tmp_path / "out")
    assert not list(tmp_path.iterdir())
