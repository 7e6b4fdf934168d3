"""A round on disk: whole at any moment, whatever is killed, and the same as in memory."""

import pytest
import torch
from helpers import Killed, dying, evidence_of, same_weights
from models import build, config, full_disk, tokenizer

from optimum_structprune import Plan, StructPruneConfig, StructPruneError, StructPruner
from optimum_structprune.arch.load import describe
from optimum_structprune.pruning import checkpoint
from optimum_structprune.pruning.checkpoint import Checkpoint, State, run_key
from optimum_structprune.pruning.sweep import Sweep


MEASURED = [
    {"widths": {"mlp": {0: 30, 1: 40}}, "shares": {"a": 0.5, "b": 0.5}, "perplexity_ratio": {"a": 1.1, "b": 1.2}},
    {"widths": {"mlp": 24}, "shares": {"a": 0.4, "b": 0.6}, "perplexity_ratio": {"a": 1.3, "b": 1.3}, "holds": True},
    {"widths": {"mlp": 9}, "shares": {"a": 0.3, "b": 0.7}, "perplexity_ratio": {}, "holds": False},
]


@pytest.fixture(scope="module")
def states():
    """The states of three rounds of one run, and the description of their model."""
    model, evidence = build("llama-bias"), evidence_of(config())
    arch = describe(model)
    sweep, made = Sweep(model, arch, evidence.config), []
    for number, width in enumerate((30, 24, 9), start=1):
        passes = evidence.passes(model, arch)
        sweep.run_(passes, evidence.mixture, {"mlp": width, "attention": 2}, None, "round")
        made.append(State(number, (0.5 - number / 10, 0.5 + number / 10), sweep.snapshot(), MEASURED[:number]))
    return made, arch


def save(folder, state, key="key"):
    Checkpoint(folder, key).save(state.snapshot, state.shares, state.number, state.measured)


def assert_same(found, state):
    assert (found.number, found.shares, found.measured) == (state.number, state.shares, state.measured)
    assert found.snapshot.keep == dict(state.snapshot.keep)
    assert found.snapshot.consumers.keys() == state.snapshot.consumers.keys()
    for axis, values in state.snapshot.consumers.items():
        for ours, theirs in zip(found.snapshot.consumers[axis], values, strict=True):
            assert (ours is None and theirs is None) or torch.equal(ours, theirs)


def test_what_was_saved_last_is_what_is_loaded(states, tmp_path):
    made, arch = states
    assert Checkpoint(tmp_path / "rounds", "key").load(arch) is None
    for state in made:
        save(tmp_path / "rounds", state)
        assert_same(Checkpoint(tmp_path / "rounds", "key").load(arch), state)
        # One round is on disk, not all of them.
        files = {path.name for path in (tmp_path / "rounds").iterdir()}
        assert files == {"rounds.json", f"round-{state.number}.safetensors"}


@pytest.mark.parametrize("after", [False, True])
def test_a_kill_between_any_two_writes_leaves_a_whole_round(states, after, tmp_path, monkeypatch):
    (first, second, third), arch = states
    number, done, loaded = 0, False, []
    while not done:
        number += 1
        folder = tmp_path / str(number)
        save(folder, first)
        with dying(monkeypatch, checkpoint, number, after) as count:
            try:
                save(folder, second)
                done = True
            except Killed:
                pass
        found = Checkpoint(folder, "key").load(arch)
        assert_same(found, {1: first, 2: second}[found.number])
        loaded.append(found.number)
        # The run goes on from there: the round is made anew, or the next one follows.
        save(folder, second if found.number == 1 else third)
        assert_same(Checkpoint(folder, "key").load(arch), second if found.number == 1 else third)
        assert len(list(folder.glob("*.safetensors"))) == 1, "what a kill has left is gone after the next round"
    assert loaded == sorted(loaded) and set(loaded) == {1, 2} and count() >= 4


@pytest.mark.parametrize("after", [False, True])
def test_a_kill_in_the_first_round_leaves_none_or_one(states, after, tmp_path, monkeypatch):
    (first, *_), arch = states
    for number in (1, 2, 3):
        folder = tmp_path / str(number)
        with dying(monkeypatch, checkpoint, number, after), pytest.raises(Killed):
            save(folder, first)
        if (found := Checkpoint(folder, "key").load(arch)) is not None:
            assert_same(found, first)
        save(folder, first)
        assert_same(Checkpoint(folder, "key").load(arch), first)


@pytest.mark.parametrize("size", [0, 100, 3000])
def test_a_full_disk_leaves_the_last_round(states, size, tmp_path):
    (first, second, _), arch = states
    save(tmp_path, first)
    with full_disk(size), pytest.raises(StructPruneError, match="Round 2 could not be saved.*round is intact"):
        save(tmp_path, second)
    assert_same(Checkpoint(tmp_path, "key").load(arch), first)
    save(tmp_path, second)
    assert_same(Checkpoint(tmp_path, "key").load(arch), second)


def test_a_half_written_file_of_another_round_is_passed_over(states, tmp_path):
    (first, *_), arch = states
    save(tmp_path, first)
    (tmp_path / "round-2.safetensors").write_bytes(b"half")
    (tmp_path / "rounds.json.new").write_text('{"key"')
    assert_same(Checkpoint(tmp_path, "key").load(arch), first)


@pytest.mark.parametrize("name", ["rounds.json", "round-1.safetensors"])
def test_a_file_that_is_gone(name, states, tmp_path):
    (first, *_), arch = states
    save(tmp_path, first)
    (tmp_path / name).unlink()
    if name == "rounds.json":
        assert Checkpoint(tmp_path, "key").load(arch) is None
    else:
        with pytest.raises(StructPruneError, match="is not a readable checkpoint .*; remove it to start anew"):
            Checkpoint(tmp_path, "key").load(arch)


def test_another_key_is_another_run(states, tmp_path):
    (first, *_), arch = states
    save(tmp_path, first)
    with pytest.raises(StructPruneError, match="holds round 1 of a run with another model, config or calibration"):
        Checkpoint(tmp_path, "other").load(arch)


def test_the_key_names_all_that_makes_a_run():
    model, evidence = build("llama-tied"), evidence_of(config(rounds=2))
    entries = evidence.entries()

    def key(settings=evidence.config, of=model, text=entries, target=24):
        return run_key(settings, of, text, {"mlp": target})

    same = key()
    assert key(config(rounds=2, batch_size=1, checkpoint_dir="elsewhere")) == same
    others = [key(config(rounds=3)), key(of=build("llama-tied", seed=1)), key(text=entries[:1]), key(target=20)]
    assert len({same, *others}) == 5


@pytest.mark.parametrize("fields", [{}, {"allocation": "global"}, {"skip_layers": (1,)}])
def test_the_config_of_a_kept_round_names_its_own_widths(fields, tmp_path):
    settings = config(rounds=3, keep_rounds=True, checkpoint_dir=str(tmp_path), round_to=1, **fields)
    pruner = StructPruner(settings)
    small = pruner.prune_model(build("llama-tied"), tokenizer())
    for number, entry in enumerate(pruner.report.rounds[:-1], start=1):
        saved = StructPruneConfig.from_pretrained(tmp_path / f"round-{number}")
        plan = Plan.load(tmp_path / f"round-{number}" / "pruning_plan.json")
        assert saved.sparsity is None and saved.budget is None
        assert saved.widths == entry["widths"]
        # What it names is what that model has, and what pruning with it gives.
        again = StructPruner(StructPruneConfig.from_dict({**saved.to_dict(), "rounds": 1, "keep_rounds": False,
                             "checkpoint_dir": None, "domains": settings.domains}))  # fmt: skip
        again.prune_model(build("llama-tied"), tokenizer())
        full = {layer: 40 for layer in range(2)}
        assert again.report.widths["mlp"] == {**full, **plan.widths().get("mlp", {})}
    assert not same_weights(small, build("llama-tied"))
