"""A run that is killed goes on at the layer where it was, with the same result."""

import pytest
import torch
from helpers import Killed, dying, evidence_of, same_weights
from models import build, config, full_disk, tokenizer

from optimum_structprune import InPlaceError, StructPruneError, StructPruner
from optimum_structprune.pruning.rounds import run_key
from optimum_structprune.system import resume


RUNS = {
    "llama-tied": {"widths": {"mlp": 24, "attention": 2}},
    "llama-bias": {"criterion": "flap", "refit": "bias"},
    "qwen3": {"criterion": "random", "refit": "none"},
    "gemma2": {"rounds": 2, "objective": "worst"},
    "granite": {"error_feedback": 0.25},
    "mixtral": {},
    "qwen2": {"criterion": "wanda"},
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
        with dying(monkeypatch, resume, number, after):
            try:
                pruned(case, folder, **RUNS[case])
                finished = True
            except Killed:
                pass
        resumed, pruner = pruned(case, folder, **RUNS[case])
        assert pruner.plan == expected.plan and same_weights(resumed, whole)
        noted, whole_noted = (one.report.details.choices for one in (pruner, expected))
        assert noted == whole_noted != {}


def test_finished_layers_are_not_made_again(tmp_path, monkeypatch):
    whole, _ = pruned("llama-tied", tmp_path / "run")
    monkeypatch.setattr(resume.Resume, "save", None)
    resumed, pruner = pruned("llama-tied", tmp_path / "run")
    assert same_weights(resumed, whole)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "layer.json",
        "layer-1.safetensors",
        "layer-2.safetensors",
        "layer-2-0-of-1.safetensors",
    }


def test_a_full_disk_names_the_layer_and_leaves_those_before(tmp_path):
    model = build("llama-tied")
    pruner = StructPruner(config(checkpoint_dir=str(tmp_path / "run")))
    with full_disk(3000), pytest.raises(InPlaceError, match="Layer 1 could not be saved.*before is intact"):
        pruner.prune_model(model, tokenizer(), inplace=True)
    assert same_weights(*(pruned("llama-tied", folder)[0] for folder in (tmp_path / "run", None)))


def test_another_run_is_refused_before_anything_changes(tmp_path):
    pruned("llama-tied", tmp_path / "run")
    model = build("llama-tied")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(StructPruneError, match="holds layer 2 of a run with another model, config or calibration"):
        StructPruner(config(widths={"mlp": 20}, checkpoint_dir=str(tmp_path / "run"))).prune_model(
            model, tokenizer(), inplace=True
        )
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_key_names_all_that_makes_a_run():
    model, evidence = build("llama-tied"), evidence_of(config(rounds=2))
    entries = evidence.entries()

    def key(settings=evidence.config, of=model, text=entries, target=24):
        return run_key(settings, of, text, {"mlp": target})

    same = key()
    assert key(config(rounds=2, batch_size=1, checkpoint_dir="elsewhere")) == same
    others = [key(config(rounds=3)), key(of=build("llama-tied", seed=1)), key(text=entries[:1]), key(target=20)]
    assert len({same, *others}) == 5
