"""What is on disk is whole at any moment, whatever is killed, and the same as what was in memory."""

from math import inf
from pathlib import Path

import pytest
import torch
from helpers import Killed, dying
from models import full_disk
from safetensors.torch import save_file

from optimum_structprune import StructPruneError
from optimum_structprune.system import resume
from optimum_structprune.system.resume import Resume


VALUES = {"shares": [0.5, 0.5], "measured": [{"ratio": inf}]}


def tensors(number):
    return {"weight": torch.full((20, 20), float(number)), "bias": torch.full((3,), number, dtype=torch.bfloat16)}


def store(folder, key="key", **how):
    return Resume(folder, key, "round", **how)


def save(folder, number, **how):
    store(folder, **how).save(number, {**VALUES, "number": number}, tensors(number), {"own": torch.ones(number)})


def assert_holds(folder, number, **how):
    saved = store(folder, **how).load()
    assert (saved.number, saved.values) == (number, {**VALUES, "number": number})
    assert all(torch.equal(saved.tensors[name], tensor) for name, tensor in tensors(number).items())
    assert torch.equal(saved.local["own"], torch.ones(number))


def test_what_was_saved_last_is_what_is_loaded(tmp_path):
    assert store(tmp_path / "run").load() is None
    for number in (1, 2, 3):
        save(tmp_path / "run", number)
        assert_holds(tmp_path / "run", number)
        names = {path.name for path in (tmp_path / "run").iterdir()}
        assert names == {"round.json", f"round-{number}.safetensors", f"round-{number}-0-of-1.safetensors"}


def test_the_tensors_of_every_number_stay_where_they_are_needed(tmp_path):
    for number in (1, 2, 3):
        save(tmp_path, number, every=True)
    for number in (1, 2, 3):
        assert torch.equal(store(tmp_path, every=True).tensors(number)["weight"], tensors(number)["weight"])
    assert len(list(tmp_path.glob("*-of-1.safetensors"))) == 1


@pytest.mark.parametrize("after", [False, True])
def test_a_kill_between_any_two_writes_leaves_what_was_saved(after, tmp_path, monkeypatch):
    number, done, loaded = 0, False, []
    while not done:
        number += 1
        folder = tmp_path / str(number)
        save(folder, 1)
        with dying(monkeypatch, resume, number, after) as count:
            try:
                save(folder, 2)
                done = True
            except Killed:
                pass
        loaded.append(store(folder).load().number)
        assert_holds(folder, loaded[-1])
        # The run goes on from there: the round is made anew, or the next one follows.
        save(folder, loaded[-1] + 1)
        assert_holds(folder, loaded[-1] + 1)
        assert len(list(folder.glob("*.safetensors"))) == 2, "what a kill has left is gone after the next round"
    assert loaded == sorted(loaded) and set(loaded) == {1, 2} and count() >= 5


@pytest.mark.parametrize("after", [False, True])
def test_a_kill_while_the_first_is_saved_leaves_none_or_one(after, tmp_path, monkeypatch):
    for number in (1, 2, 3, 4):
        folder = tmp_path / str(number)
        with dying(monkeypatch, resume, number, after), pytest.raises(Killed):
            save(folder, 1)
        if store(folder).load() is not None:
            assert_holds(folder, 1)
        save(folder, 1)
        assert_holds(folder, 1)


@pytest.mark.parametrize("size", [0, 100, 1000])
def test_a_full_disk_leaves_what_was_saved_before(size, tmp_path):
    save(tmp_path, 1)
    with full_disk(size), pytest.raises(StructPruneError, match="Round 2 could not be saved.*before is intact"):
        save(tmp_path, 2)
    assert_holds(tmp_path, 1)
    save(tmp_path, 2)
    assert_holds(tmp_path, 2)


def test_half_written_files_of_another_round_are_passed_over(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "round-2.safetensors").write_bytes(b"half")
    (tmp_path / "round.json.new").write_text('{"key"')
    assert_holds(tmp_path, 1)


def shortened(path):
    path.write_bytes(path.read_bytes()[:-40])


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("round.json", shortened),
        *(("round.json", lambda path, text=text: path.write_text(text)) for text in ("{", "[]", '{"key": "x"}')),
        ("round-1.safetensors", shortened),
        ("round-1.safetensors", Path.unlink),
        ("round-1.safetensors", lambda path: save_file({"other": torch.zeros(1)}, path)),
        ("round-1-0-of-1.safetensors", shortened),
    ],
)
def test_a_damaged_file_is_named(name, damage, tmp_path):
    save(tmp_path, 1)
    damage(tmp_path / name)
    with pytest.raises(StructPruneError, match="round.json is not a readable checkpoint .*; remove it to start anew"):
        store(tmp_path).load()


def test_another_key_is_another_run(tmp_path):
    save(tmp_path, 1)
    with pytest.raises(StructPruneError, match="holds round 1 of a run with another model, config or calibration"):
        store(tmp_path, key="other").load()


def test_another_number_of_processes_is_refused_with_both(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(resume, "process_count", lambda: 2)
        save(tmp_path, 2)
    with pytest.raises(StructPruneError, match="round 2 of a run with 2 processes.*run has 1; start 2, or remove"):
        store(tmp_path).load()
