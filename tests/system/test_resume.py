"""What is on disk is whole at any moment, whatever is killed, and the same as what was in memory."""

from dataclasses import replace
from math import inf

import pytest
import torch
from helpers import Killed, contents, data_of, dying, put_into, same_weights
from models import build, config, full_disk, tokenizer

from optimum_structprune import InPlaceError, RunOptions, StructPruneError, StructPruner
from optimum_structprune.steps.checkpoint import run_key
from optimum_structprune.system import resume
from optimum_structprune.system.resume import Resume


VALUES = {"shares": [0.5, 0.5], "measured": [{"ratio": inf}]}


def tensors(number):
    return {"weight": torch.full((20, 20), float(number)), "bias": torch.full((3,), number, dtype=torch.bfloat16)}


def store(folder, key="key"):
    return Resume(folder, key, "layer")


def save(folder, number):
    store(folder).save(number, {**VALUES, "number": number}, tensors(number), {"own": torch.ones(number)})


def assert_holds(folder, number):
    saved = store(folder).load()
    assert (saved.number, saved.values) == (number, {**VALUES, "number": number})
    for past in range(1, number + 1):
        found = store(folder).tensors(past)
        assert all(torch.equal(found[name], tensor) for name, tensor in tensors(past).items())
    assert torch.equal(saved.local["own"], torch.ones(number))


@pytest.mark.parametrize("after", [False, True])
def test_a_kill_between_any_two_writes_leaves_what_was_saved_and_files_of_the_user(after, tmp_path, monkeypatch):
    number, done, loaded = 0, False, []
    while not done:
        number += 1
        folder = tmp_path / str(number)
        assert store(folder).load() is None
        put_into(folder, {"layer-notes.safetensors": "of the user"})
        save(folder, 1)
        with dying(monkeypatch, resume, number, after) as count:
            try:
                save(folder, 2)
                done = True
            except Killed:
                pass
        loaded.append(store(folder).load().number)
        assert_holds(folder, loaded[-1])
        # The run goes on from there: the layer is made anew, or the next one follows.
        last = loaded[-1] + 1
        save(folder, last)
        assert_holds(folder, last)
        names = {"layer-notes.safetensors", *(f"layer-{past}.safetensors" for past in range(1, last + 1))}
        # What a kill has left is gone after the next layer.
        assert contents(folder).keys() == {*names, "layer.json", f"layer-{last}-0-of-1.safetensors"}
    assert loaded == sorted(loaded) and set(loaded) == {1, 2} and count() >= 5


def test_a_full_disk_and_half_written_files_leave_what_was_saved_before(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "layer-2.safetensors").write_bytes(b"half")
    (tmp_path / "layer.json.new").write_text('{"key"')
    assert_holds(tmp_path, 1)
    for size in (0, 100, 1000):
        with full_disk(size), pytest.raises(StructPruneError, match="Layer 2 .*previous checkpoint is intact"):
            save(tmp_path, 2)
        assert_holds(tmp_path, 1)
    save(tmp_path, 2)
    assert_holds(tmp_path, 2)


def test_a_damaged_file_is_named(tmp_path):
    names, texts = ("layer.json", "layer-1-0-of-1.safetensors", "layer-1.safetensors"), ("{", "[]", '{"key": "x"}')
    for name, text in [*((name, None) for name in names), *(("layer.json", text) for text in texts)]:
        save(tmp_path, 1)
        path = tmp_path / name
        path.write_bytes(path.read_bytes()[:-40] if text is None else text.encode())
        with pytest.raises(StructPruneError, match="layer.json is not a readable checkpoint .*. Remove it to start"):
            store(tmp_path).load()
            store(tmp_path).tensors(1)


def test_another_number_of_processes_is_refused_with_both(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(resume, "process_count", lambda: 2)
        save(tmp_path, 2)
    with pytest.raises(StructPruneError, match="layer 2 of a run with 2 processes.*run has 1. Start 2"):
        store(tmp_path).load()


RUNS = {
    "llama-tied": {"widths": {"mlp": 24, "attention": 2}, "criterion": "flap"},
    "gemma2": {"refit": "none"},
    "mixtral": {"error_feedback": 0.25},
}


def pruned(case, folder, **fields):
    pruner = StructPruner(config(**fields), RunOptions(checkpoint_dir=None if folder is None else str(folder)))
    return pruner.prune_model(build(case), tokenizer()), pruner


@pytest.mark.slow
@pytest.mark.parametrize(("case", "after"), [("llama-tied", False), ("gemma2", False), ("mixtral", True)])
def test_a_kill_at_any_write_leaves_what_the_next_run_goes_on_from(case, after, tmp_path, monkeypatch):
    whole, expected = pruned(case, None, **RUNS[case])
    number, finished = 0, False
    while not finished:
        number += 2 if case == "llama-tied" else 4
        folder = tmp_path / str(number)
        with dying(monkeypatch, resume, number, after):
            try:
                pruned(case, folder, **RUNS[case])
                finished = True
            except Killed:
                pass
        resumed, pruner = pruned(case, folder, **RUNS[case])
        assert pruner.plan == expected.plan and same_weights(resumed, whole)


def test_finished_layers_are_not_made_again(tmp_path, monkeypatch):
    whole, _ = pruned("llama-tied", tmp_path / "run")
    monkeypatch.setattr(resume.Resume, "save", None)
    resumed, pruner = pruned("llama-tied", tmp_path / "run")
    assert same_weights(resumed, whole)
    monkeypatch.undo()
    other, _ = pruned("llama-tied", tmp_path / "run", widths={"mlp": 20})  # another config begins anew beside it
    assert other.config.intermediate_size == 20 and len([*(tmp_path / "run").glob("layer-*.json")]) == 2
    pruned("llama-tied", tmp_path / "run")


def test_a_full_disk_names_the_layer_and_leaves_those_before(tmp_path):
    model = build("llama-tied")
    pruner = StructPruner(config(), RunOptions(checkpoint_dir=str(tmp_path / "run")))
    with full_disk(3000), pytest.raises(InPlaceError, match="Layer 1 .*previous checkpoint is intact"):
        pruner.prune_model(model, tokenizer(), inplace=True)
    assert same_weights(*(pruned("llama-tied", folder)[0] for folder in (tmp_path / "run", None)))


def test_the_key_names_all_that_makes_a_run():
    model, data = build("llama-tied"), data_of(config())

    def key(settings=data.config, of=model, domains=data.domains, target=24):
        return run_key(replace(data, config=settings, domains=domains), of, {"mlp": target})

    same = key()
    others = [key(config(rounds=3)), key(of=build("llama-tied", seed=1)), key(domains=data.domains[:1])]
    assert len({same, *others, key(target=20)}) == 5 and key() == same
