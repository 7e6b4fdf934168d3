"""A run that is killed goes on at the layer where it was, with the same result."""

import pytest
import torch
from helpers import Killed, dying, same_weights
from models import build, config, full_disk, tokenizer

from optimum_structprune import InPlaceError, StructPruneError, StructPruner
from optimum_structprune.pruning import progress


RUNS = {
    "llama-tied": {"widths": {"mlp": 24, "attention": 2}},
    "llama-bias": {"criterion": "flap", "refit": "bias"},
    "qwen3": {"criterion": "random", "refit": "none"},
    "gemma2": {"rounds": 2, "adaptive_rate": 1.0},
    "granite": {"error_feedback": 0.25},
    "mixtral": {},
    "qwen2": {"criterion": "taylor"},
}


def pruned(case, folder, **fields):
    pruner = StructPruner(config(**fields, checkpoint_dir=None if folder is None else str(folder)))
    return pruner.prune_model(build(case), tokenizer()), pruner


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("case", RUNS)
def test_a_kill_at_any_write_leaves_what_the_next_run_goes_on_from(case, after, tmp_path, monkeypatch):
    whole, expected = pruned(case, None, **RUNS[case])
    number, finished = 0, False
    while not finished:
        number += 1 if case == "llama-tied" else 3
        folder = tmp_path / str(number)
        with dying(monkeypatch, progress, number, after):
            try:
                pruned(case, folder, **RUNS[case])
                finished = True
            except Killed:
                pass
        resumed, pruner = pruned(case, folder, **RUNS[case])
        assert pruner.plan == expected.plan and same_weights(resumed, whole)
        noted, whole_noted = (one.report.details.to_dict()["choices"] for one in (pruner, expected))
        assert noted == whole_noted != {}


def test_finished_layers_are_not_made_again(tmp_path, monkeypatch):
    whole, _ = pruned("llama-tied", tmp_path / "run")
    monkeypatch.setattr(progress.Progress, "save", None)
    resumed, pruner = pruned("llama-tied", tmp_path / "run")
    assert same_weights(resumed, whole)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "layers.json",
        "layer-000.safetensors",
        "layer-001.safetensors",
        "passes-1-0-of-1.safetensors",
    }


def test_a_full_disk_names_the_layer_and_leaves_those_before(tmp_path):
    model = build("llama-tied")
    pruner = StructPruner(config(checkpoint_dir=str(tmp_path / "run")))
    with (
        full_disk(3000),
        pytest.raises(InPlaceError, match="Layer 0 could not be saved.*layers before are intact"),
    ):
        pruner.prune_model(model, tokenizer(), inplace=True)
    assert same_weights(*(pruned("llama-tied", folder)[0] for folder in (tmp_path / "run", None)))


def test_another_run_is_refused_before_anything_changes(tmp_path):
    pruned("llama-tied", tmp_path / "run")
    model = build("llama-tied")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(StructPruneError, match="holds 2 layers of a run with another model, config or calibration"):
        StructPruner(config(widths={"mlp": 20}, checkpoint_dir=str(tmp_path / "run"))).prune_model(
            model, tokenizer(), inplace=True
        )
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", ["layers.json", "layer-000.safetensors", "passes-1-0-of-1.safetensors"])
def test_a_damaged_file_is_named(name, tmp_path):
    pruned("llama-tied", tmp_path / "run")
    path = tmp_path / "run" / name
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(StructPruneError, match="run is not a readable checkpoint .*; remove it to start anew"):
        pruned("llama-tied", tmp_path / "run")


def test_a_run_of_another_number_of_processes_is_refused_with_both(tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "process_count", lambda: 2)
    pruned("llama-tied", tmp_path / "run")
    monkeypatch.undo()
    with pytest.raises(StructPruneError, match="2 layers of a run with 2 processes.*run has 1; start 2, or remove"):
        pruned("llama-tied", tmp_path / "run")
