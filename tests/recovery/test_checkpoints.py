"""A training goes on from the last checkpoint that is whole, whatever a kill has left of the later ones."""

import json
import shutil
import warnings
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from helpers import logits, recovery_config
from models import build, config, tokenizer

from optimum_structprune import StructPruneError, prune_model, recover
from optimum_structprune.recovery.checkpoints import last_checkpoint
from optimum_structprune.recovery.identity import Identity, read_identity


# What a training on the CPU leaves in a checkpoint, and what stays of a file that was cut.
FILES = [
    "adapter_config.json",
    "adapter_model.safetensors",
    "optimizer.pt",
    "recovery_identity.json",
    "rng_state.pth",
    "scheduler.pt",
    "trainer_state.json",
]
OPTIONAL = {"recovery_identity.json", "rng_state.pth"}  # older checkpoints have no identity
CUTS = {"half": lambda data: data[: len(data) // 2], "empty": lambda data: b"", "zeros": lambda data: bytes(len(data))}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A pruned model, the settings of a training, its folder and what came of it."""
    folder = tmp_path_factory.mktemp("run")
    pruned = prune_model(build("llama-tied"), config(), tokenizer())
    training = {"output_dir": str(folder), "save_steps": 2, "save_total_limit": 5}
    settings = recovery_config(tokens=192, training=training)
    return pruned, settings, folder, recover(deepcopy(pruned), tokenizer(), settings)


@pytest.fixture
def folder(run, tmp_path):
    return shutil.copytree(run[2], tmp_path / "run")


def identity_in(folder):
    return Identity(**read_identity(folder / "checkpoint-4"))


@pytest.mark.parametrize("how", [*CUTS, "gone"])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_passed_over(folder, name, how):
    identity, file = identity_in(folder), folder / "checkpoint-4" / name
    assert last_checkpoint(str(folder), identity) == str(folder / "checkpoint-4")
    if how == "gone":
        file.unlink()
    else:
        file.write_bytes(CUTS[how](file.read_bytes()))
    quiet = how == "gone" and name in {*OPTIONAL, "trainer_state.json"}
    with warnings.catch_warnings() if quiet else pytest.warns(UserWarning, match="checkpoint-4 is passed over: "):
        expected = "checkpoint-4" if how == "gone" and name == "rng_state.pth" else "checkpoint-2"
        assert last_checkpoint(str(folder), identity) == str(folder / expected)


def test_nothing_is_left_to_go_on_from(folder):
    identity = identity_in(folder)
    for path in folder.glob("checkpoint-*/trainer_state.json"):
        path.write_text(path.read_text()[:20])
    (folder / "checkpoint-best").mkdir()
    (folder / "checkpoint-best" / "trainer_state.json").write_text("{}")
    with (
        pytest.warns(UserWarning, match="passed over"),
        pytest.raises(StructPruneError, match="There is no checkpoint"),
    ):
        last_checkpoint(str(folder), identity)


def test_a_training_that_keeps_no_optimizer(folder):
    for path in folder.glob("*/*.pt"):
        path.unlink()
    with pytest.warns(UserWarning, match="no state of the optimizer"), pytest.raises(StructPruneError):
        last_checkpoint(str(folder), identity_in(folder))
    assert last_checkpoint(str(folder), identity_in(folder), only_model=True) == str(folder / "checkpoint-4")


def test_training_goes_on_from_the_one_before(run, folder):
    pruned, settings, _, expected = run
    state = folder / "checkpoint-4" / "trainer_state.json"
    state.write_text(state.read_text()[:100])
    again = replace(settings, training={**settings.training, "output_dir": str(folder)})
    with pytest.warns(UserWarning, match="checkpoint-4 is passed over"):
        resumed = recover(deepcopy(pruned), tokenizer(), again, resume=True)
    torch.testing.assert_close(logits(resumed), logits(expected))
    assert json.loads(state.read_text())["global_step"] == 4
