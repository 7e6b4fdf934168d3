"""Test that checkpoints survive kills, full disks and damage."""

from dataclasses import replace
from math import inf

import pytest
import torch
from helpers import Killed, contents, data_of, dying, flipped_bytes, put_into, same_weights
from models import build, config, full_disk, tokenizer

from optimum_structprune import InPlaceError, RunOptions, StructPruneError, StructPruner
from optimum_structprune.steps.checkpoint import run_key
from optimum_structprune.system import resume
from optimum_structprune.system.resume import Resume


VALUES = {"shares": [0.5, 0.5], "measured": [{"ratio": inf}]}


def tensors_of(number):
    """Return the tensors of the checkpoint with this number."""
    return {"weight": torch.full((20, 20), float(number)), "bias": torch.full((3,), number, dtype=torch.bfloat16)}


def open_store(folder):
    return Resume(folder, "key", "layer")


def save(folder, number):
    values = VALUES | {"number": number}
    open_store(folder).save(number, values, tensors_of(number), {"own": torch.ones(number)})


def assert_holds(folder, number):
    """Check that the folder holds this checkpoint and the tensors of all earlier ones."""
    checkpoint = open_store(folder).load()
    assert checkpoint.number == number
    assert checkpoint.values == VALUES | {"number": number}
    assert torch.equal(checkpoint.local["own"], torch.ones(number))

    for past in range(1, number + 1):
        loaded = open_store(folder).tensors(past)
        for name, tensor in tensors_of(past).items():
            assert torch.equal(loaded[name], tensor)


@pytest.mark.parametrize("after", [False, True])
def test_a_kill_between_any_two_writes_keeps_the_checkpoint_and_files_of_the_user(after, tmp_path, monkeypatch):
    number = 0
    finished = False
    last_numbers = []
    while not finished:
        number += 1
        folder = tmp_path / str(number)
        assert open_store(folder).load() is None
        put_into(folder, {"layer-notes.safetensors": "of the user"})
        save(folder, 1)

        with dying(monkeypatch, resume, number, after) as count_writes:
            try:
                save(folder, 2)
                finished = True
            except Killed:
                pass
        last_number = open_store(folder).load().number
        last_numbers.append(last_number)
        assert_holds(folder, last_number)

        # The resumed run saves the next layer and removes the files of the killed run.
        next_number = last_number + 1
        save(folder, next_number)
        assert_holds(folder, next_number)
        expected_files = {"layer.json", f"layer-{next_number}-0-of-1.safetensors", "layer-notes.safetensors"}
        for past in range(1, next_number + 1):
            expected_files.add(f"layer-{past}.safetensors")
        assert contents(folder).keys() == expected_files

    assert last_numbers == sorted(last_numbers)
    assert set(last_numbers) == {1, 2}
    assert count_writes() >= 5


def test_half_written_files_keep_the_previous_checkpoint(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "layer-2.safetensors").write_bytes(b"half")
    (tmp_path / "layer.json.new").write_text('{"key"')

    assert_holds(tmp_path, 1)


def test_a_full_disk_keeps_the_previous_checkpoint(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "layer-2.safetensors").write_bytes(b"half")
    (tmp_path / "layer.json.new").write_text('{"key"')

    for size in (0, 100, 1000):
        with full_disk(size), pytest.raises(StructPruneError, match="Layer 2 .*previous checkpoint is intact"):
            save(tmp_path, 2)
        assert_holds(tmp_path, 1)

    save(tmp_path, 2)
    assert_holds(tmp_path, 2)


def assert_unreadable(folder):
    with pytest.raises(StructPruneError, match="layer.json is not a readable checkpoint .*. Remove it to start"):
        open_store(folder).load()
        open_store(folder).tensors(1)


def test_a_damaged_file_is_named(tmp_path):
    for name in ("layer.json", "layer-1-0-of-1.safetensors", "layer-1.safetensors"):
        save(tmp_path, 1)
        path = tmp_path / name
        path.write_bytes(path.read_bytes()[:-40])
        assert_unreadable(tmp_path)

    for name in ("layer.json", "layer-1-0-of-1.safetensors", "layer-1.safetensors"):
        save(tmp_path, 1)
        for _ in flipped_bytes(tmp_path / name):
            assert_unreadable(tmp_path)

    for text in ("{", "[]", '{"key": "x"}'):
        save(tmp_path, 1)
        (tmp_path / "layer.json").write_text(text)
        assert_unreadable(tmp_path)


def test_another_number_of_processes_is_refused_with_both_numbers(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(resume, "process_count", lambda: 2)
        save(tmp_path, 2)

    with pytest.raises(StructPruneError, match="layer 2 of a run with 2 processes.*run has 1. Start 2"):
        open_store(tmp_path).load()


RUNS = {
    "llama-tied": {"widths": {"mlp": 24, "attention": 2}, "criterion": "flap"},
    "gemma2": {"refit": "none"},
    "mixtral": {"error_feedback": 0.25},
}


def prune(case, folder=None, **fields):
    """Return a pruned model and its pruner, with checkpoints in `folder` if there is one."""
    options = RunOptions()
    if folder is not None:
        options = RunOptions(checkpoint_dir=str(folder))
    pruner = StructPruner(config(**fields), options)
    return pruner.prune_model(build(case), tokenizer()), pruner


@pytest.mark.slow
@pytest.mark.parametrize(("case", "after"), [("llama-tied", False), ("gemma2", False), ("mixtral", True)])
def test_a_run_resumes_after_a_kill_at_any_write(case, after, tmp_path, monkeypatch):
    expected_model, expected_pruner = prune(case, **RUNS[case])
    stride = 4
    if case == "llama-tied":
        stride = 2

    number = 0
    finished = False
    while not finished:
        number += stride
        folder = tmp_path / str(number)
        with dying(monkeypatch, resume, number, after):
            try:
                prune(case, folder, **RUNS[case])
                finished = True
            except Killed:
                pass

        resumed_model, pruner = prune(case, folder, **RUNS[case])
        assert pruner.result.plan == expected_pruner.result.plan
        assert same_weights(resumed_model, expected_model)


def test_finished_layers_are_loaded_and_not_pruned_a_second_time(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    model, _ = prune("llama-tied", folder)

    with monkeypatch.context() as patch:
        patch.setattr(resume.Resume, "save", None)
        resumed_model, _ = prune("llama-tied", folder)

    assert same_weights(resumed_model, model)


def test_a_run_with_another_config_has_its_own_checkpoints(tmp_path):
    folder = tmp_path / "run"
    prune("llama-tied", folder)

    narrower_model, _ = prune("llama-tied", folder, widths={"mlp": 20})
    assert narrower_model.config.intermediate_size == 20
    assert len(list(folder.glob("layer-*.json"))) == 2

    prune("llama-tied", folder)


def test_a_full_disk_names_the_layer_and_keeps_the_layers_before(tmp_path):
    folder = tmp_path / "run"
    pruner = StructPruner(config(), RunOptions(checkpoint_dir=str(folder)))
    with full_disk(3000), pytest.raises(InPlaceError, match="Layer 1 .*previous checkpoint is intact"):
        pruner.prune_model(build("llama-tied"), tokenizer(), inplace=True)

    resumed_model, _ = prune("llama-tied", folder)
    expected_model, _ = prune("llama-tied")
    assert same_weights(resumed_model, expected_model)


def test_the_key_depends_on_everything_that_determines_a_run():
    data = data_of(config())
    model = build("llama-tied")
    widths = {"mlp": 24}
    key = run_key(data, model, widths)
    assert run_key(data, model, widths) == key

    other_keys = {
        run_key(replace(data, config=config(rounds=3)), model, widths),
        run_key(replace(data, domains=data.domains[:1]), model, widths),
        run_key(data, build("llama-tied", seed=1), widths),
        run_key(data, model, {"mlp": 20}),
    }
    assert len(other_keys) == 4
    assert key not in other_keys
