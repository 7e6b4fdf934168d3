"""A training goes on from its own last checkpoint that is whole, and from no other."""

import json
import shutil
import warnings
from copy import deepcopy

import pytest
import torch
from accelerate import cpu_offload
from helpers import failing, logits, recovery_config, same_weights, unread
from models import build, full_disk, tokenizer
from transformers import Trainer

from optimum_structprune import DomainConfig, StructPruneError, recover
from optimum_structprune.system.fingerprint import fingerprint


@pytest.fixture(scope="module")
def run(small, tmp_path_factory):
    """The folder of a training with the checkpoints 2, 4, 6 and 8, and what came of it."""
    folder = tmp_path_factory.mktemp("run")
    return folder, recover(deepcopy(small), tokenizer(), settings(folder))


def settings(folder, **fields):
    training = {"output_dir": str(folder), "save_steps": 2, "save_total_limit": 5, **fields.pop("training", {})}
    return recovery_config(**{"tokens": 384, **fields}, training=training)


def other_weights(model):
    model = deepcopy(model)
    with torch.no_grad():
        model.model.norm.weight[0] += 1
    return model


@pytest.mark.parametrize("how", ["half", "gone", "empty object"])
def test_training_goes_on_from_the_one_before_a_checkpoint_cut_short(pruned, run, tmp_path, how, monkeypatch):
    """The Trainer writes its state last."""
    folder = shutil.copytree(run[0], tmp_path / "run")
    (folder / "checkpoint-best").mkdir()
    state = folder / "checkpoint-8" / "trainer_state.json"
    if how == "gone":
        state.unlink()
        (folder / "checkpoint-8" / "adapter_model.safetensors").write_bytes(b"half")
    else:
        state.write_bytes(b"{}" if how == "empty object" else state.read_bytes()[:200])
    steps, original = [], Trainer.compute_loss

    def noted(self, *arguments, **more):
        if self.model.training:
            steps.append(self.state.global_step)
        return original(self, *arguments, **more)

    monkeypatch.setattr(Trainer, "compute_loss", noted)
    with pytest.warns(UserWarning, match="checkpoint-8 is skipped: "):
        resumed = recover(deepcopy(pruned), tokenizer(), settings(folder), resume=True)
    assert steps == [6, 7]
    torch.testing.assert_close(logits(resumed), logits(run[1]))
    assert json.loads(state.read_text())["global_step"] == 8


@pytest.mark.parametrize("content", [b"", b"half"])
def test_another_damaged_file_is_told_with_its_checkpoint(pruned, run, tmp_path, content):
    folder, model = shutil.copytree(run[0], tmp_path / "run"), deepcopy(pruned)
    (folder / "checkpoint-8" / "optimizer.pt").write_bytes(content)
    with pytest.raises(StructPruneError, match="If .*checkpoint-8 is damaged, remove it"):
        recover(model, tokenizer(), settings(folder), resume=True)
    assert same_weights(model, pruned)


@pytest.mark.slow
def test_a_checkpoint_of_another_training_is_refused(pruned, run):
    model, refused = deepcopy(pruned), "checkpoint-8 belongs to another training: .*"
    for fields, message in (
        ({"lora": {"r": 2, "lora_alpha": 64}}, "lora .* there and .*64.* here"),
        ({"tokens": 96}, "tokens 384 there and 96 here"),
        ({"seed": 5}, "seed 0 there and 5 here"),
    ):
        with pytest.raises(StructPruneError, match=f"{refused}{message}"):
            recover(model, tokenizer(), settings(run[0], **fields), resume=True)
    assert same_weights(model, pruned)
    with pytest.raises(StructPruneError, match=rf"{refused}model \w+ there and \w+ here\."):
        recover(other_weights(pruned), tokenizer(), settings(run[0]), resume=True)
    with pytest.raises(StructPruneError, match="teacher None there and  here"):
        recover(model, tokenizer(), settings(run[0]), build("llama-tied"), resume=True)


def test_without_a_whole_checkpoint_there_is_nothing_to_resume(pruned, run, tmp_path):
    folder = shutil.copytree(run[0], tmp_path / "run")
    for path in folder.glob("checkpoint-*/trainer_state.json"):
        path.write_text(path.read_text()[:20])
    unseen = settings(folder, domains=[DomainConfig("a", unread())])
    with warnings.catch_warnings(), pytest.raises(StructPruneError, match=f"{folder} has no checkpoint to resume"):
        warnings.simplefilter("ignore")
        recover(deepcopy(pruned), tokenizer(), unseen, resume=True)


@pytest.mark.parametrize(("case", "fields"), [
    ("pruned", {}),
    ("taught", {"answer_share": 0.75, "training": {"learning_rate": None}}),
    ("pruned", {"train": "full", "lora": {}, "training": {"learning_rate": None}}),  # so that it is found by trials
    # In a checkpoint of the published format, each expert would have a name that the Trainer passes over.
    pytest.param("olmoe", {"train": "full", "lora": {}, "training": {"learning_rate": 1e-3}}, marks=pytest.mark.slow),
])  # fmt: skip
def test_an_interrupted_run_goes_on_to_what_an_uninterrupted_one_gives(pruned, tmp_path, monkeypatch, case, fields):
    before = build(case) if case == "olmoe" else deepcopy(pruned)
    teacher = None if case == "pruned" else build("olmoe" if case == "olmoe" else "llama-tied", seed=1)
    next(before.parameters()).requires_grad_(False)
    whole = recover(deepcopy(before), tokenizer(), settings(tmp_path / "whole", **fields), teacher)
    model = deepcopy(before)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "training_step", failing(Trainer.training_step, 6, KeyboardInterrupt()))
        patch.setattr("tempfile.TemporaryDirectory", None)  # which a kill would leave behind
        recover(model, tokenizer(), settings(tmp_path / "half", **fields), teacher)
    assert same_weights(model, before) and [*model.state_dict()] == [*before.state_dict()]
    assert [each.requires_grad for each in model.parameters()] == [each.requires_grad for each in before.parameters()]
    resumed = recover(model, tokenizer(), settings(tmp_path / "half", **fields), teacher, resume=True)
    assert same_weights(resumed, whole) and not same_weights(whole, before)


def test_a_fingerprint_is_of_the_config_and_of_the_weights_wherever_they_are():
    model, same, other = (build("llama-tied") for _ in range(3))
    expected = fingerprint(model)
    same.name_or_path, same.config.pad_token_id, same.config.use_cache = "elsewhere", 5, False  # as a Trainer sets it
    assert fingerprint(same) == expected
    other.config.rms_norm_eps *= 2
    assert expected not in map(fingerprint, (other, other_weights(model), build("llama-tied").bfloat16()))
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.device.type == "meta" and fingerprint(model) == expected


@pytest.mark.parametrize("what", ["adapter", "optimizer"])
def test_a_checkpoint_that_does_not_fit_on_the_disk(pruned, run, tmp_path, what):
    model, sizes = deepcopy(pruned), {path.name: path.stat().st_size for path in run[0].glob("checkpoint-8/*")}
    room = 2_000 if what == "adapter" else (sizes["adapter_model.safetensors"] + sizes["optimizer.pt"]) // 2
    with full_disk(room), pytest.raises(StructPruneError, match=f"stopped at step 2, .*If {tmp_path}.* has no room"):
        recover(model, tokenizer(), settings(tmp_path))
    assert same_weights(model, pruned)
