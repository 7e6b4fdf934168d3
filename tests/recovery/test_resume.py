"""A training resumes from its last complete checkpoint, and refuses checkpoints of other trainings."""

import json
import shutil
import warnings
from copy import deepcopy

import pytest
import torch
from accelerate import cpu_offload
from helpers import failing, logits, recovery_config, same_weights, unread
from models import build, config, documents, full_disk, tokenizer
from transformers import Trainer

from optimum_structprune import DomainConfig, StructPruneError, recover
from optimum_structprune.recovery.recover import Recovery
from optimum_structprune.system.fingerprint import fingerprint


@pytest.fixture(scope="module")
def finished_run(small, tmp_path_factory):
    """Return the folder of a training with the checkpoints 2, 4, 6 and 8, and the recovered model."""
    folder = tmp_path_factory.mktemp("run")
    recovered = recover(deepcopy(small), tokenizer(), settings(folder))
    return folder, recovered


@pytest.fixture
def folder(finished_run, tmp_path):
    """Return a copy of the folder of the training, which a test may damage."""
    return shutil.copytree(finished_run[0], tmp_path / "run")


def settings(folder, training=None, **fields):
    arguments = {"output_dir": str(folder), "save_steps": 2, "save_total_limit": 5}
    arguments.update(training or {})
    fields.setdefault("tokens", 384)
    return recovery_config(training=arguments, **fields)


def with_changed_weight(model):
    model = deepcopy(model)
    with torch.no_grad():
        model.model.norm.weight[0] += 1
    return model


@pytest.fixture
def trained_steps(monkeypatch):
    """Return a list of the steps whose loss is computed for a training."""
    steps = []
    compute_loss = Trainer.compute_loss

    def record_step(self, *args, **kwargs):
        if self.model.training:
            steps.append(self.state.global_step)
        return compute_loss(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "compute_loss", record_step)
    return steps


@pytest.mark.parametrize("damage", ["half", "missing", "empty object"])
def test_training_resumes_before_an_incomplete_checkpoint(pruned, finished_run, folder, damage, trained_steps):
    """The Trainer writes its state last, so a checkpoint without a valid state is incomplete."""
    (folder / "checkpoint-best").mkdir()
    state = folder / "checkpoint-8" / "trainer_state.json"
    if damage == "half":
        state.write_bytes(state.read_bytes()[:200])
    elif damage == "empty object":
        state.write_bytes(b"{}")
    else:
        state.unlink()
        (folder / "checkpoint-8" / "adapter_model.safetensors").write_bytes(b"half")

    with pytest.warns(UserWarning, match="checkpoint-8 is skipped: "):
        resumed = recover(deepcopy(pruned), tokenizer(), settings(folder), resume=True)

    assert trained_steps == [6, 7]
    torch.testing.assert_close(logits(resumed), logits(finished_run[1]))
    assert json.loads(state.read_text())["global_step"] == 8


@pytest.mark.parametrize("content", [b"", b"half"])
def test_an_error_with_a_damaged_file_names_its_checkpoint(pruned, folder, content):
    model = deepcopy(pruned)
    (folder / "checkpoint-8" / "optimizer.pt").write_bytes(content)

    with pytest.raises(StructPruneError, match="If .*checkpoint-8 is damaged, remove it"):
        recover(model, tokenizer(), settings(folder), resume=True)
    assert same_weights(model, pruned)


@pytest.mark.slow
def test_a_checkpoint_of_another_training_is_refused(pruned, finished_run):
    folder, _ = finished_run
    model = deepcopy(pruned)
    refusal = "checkpoint-8 belongs to another training: .*"

    for fields, message in (
        ({"lora": {"r": 2, "lora_alpha": 64}}, "lora .* there and .*64.* here"),
        ({"tokens": 96}, "tokens 384 there and 96 here"),
        ({"seed": 5}, "seed 0 there and 5 here"),
    ):
        with pytest.raises(StructPruneError, match=refusal + message):
            recover(model, tokenizer(), settings(folder, **fields), resume=True)
    assert same_weights(model, pruned)

    with pytest.raises(StructPruneError, match=rf"{refusal}model \w+ there and \w+ here\."):
        recover(with_changed_weight(pruned), tokenizer(), settings(folder), resume=True)
    with pytest.raises(StructPruneError, match="teacher None there and  here"):
        recover(model, tokenizer(), settings(folder), build("llama-tied"), resume=True)


def test_a_checkpoint_of_a_training_on_other_text_is_refused(pruned, tmp_path):
    """A recovery without domains reads the text of the pruning."""
    recovery = settings(tmp_path, domains=None, tokens=96, seed=0)
    pruning = config(domains=[DomainConfig("stories", documents())])
    Recovery(recovery, pruning).recover_model(deepcopy(pruned), tokenizer())

    for fields, message in (
        ({"domains": [DomainConfig("code", documents())]}, "domains .*stories.* there and .*code.* here"),
        ({"domains": pruning.domains, "seed": 5}, "pruning_seed 0 there and 5 here"),
    ):
        training = Recovery(recovery, config(**fields))
        with pytest.raises(StructPruneError, match=message):
            training.recover_model(deepcopy(pruned), tokenizer(), resume=True)


def test_without_a_complete_checkpoint_there_is_nothing_to_resume(pruned, folder):
    for path in folder.glob("checkpoint-*/trainer_state.json"):
        path.write_text(path.read_text()[:20])
    unread_text = settings(folder, domains=[DomainConfig("a", unread())])

    with warnings.catch_warnings(), pytest.raises(StructPruneError, match=f"{folder} has no checkpoint to resume"):
        warnings.simplefilter("ignore")
        recover(deepcopy(pruned), tokenizer(), unread_text, resume=True)


TRIED_RATE = {"learning_rate": None}  # trial steps find the learning rate


@pytest.mark.parametrize(("case", "fields"), [
    ("pruned", {}),
    ("with teacher", {"answer_share": 0.75, "training": TRIED_RATE}),
    ("pruned", {"train": "full", "lora": {}, "training": TRIED_RATE}),
    # In a checkpoint of the published format, the Trainer would skip the names of single experts.
    pytest.param("olmoe", {"train": "full", "lora": {}, "training": {"learning_rate": 1e-3}}, marks=pytest.mark.slow),
])  # fmt: skip
def test_an_interrupted_run_resumes_to_the_result_of_an_uninterrupted_run(pruned, tmp_path, monkeypatch, case, fields):
    original = deepcopy(pruned)
    teacher = None
    if case == "with teacher":
        teacher = build("llama-tied", seed=1)
    elif case == "olmoe":
        original = build("olmoe")
        teacher = build("olmoe", seed=1)
    next(original.parameters()).requires_grad_(False)
    uninterrupted = recover(deepcopy(original), tokenizer(), settings(tmp_path / "whole", **fields), teacher)

    model = deepcopy(original)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "training_step", failing(Trainer.training_step, 6, KeyboardInterrupt()))
        patch.setattr("tempfile.TemporaryDirectory", None)  # a killed process would not remove such a folder
        recover(model, tokenizer(), settings(tmp_path / "half", **fields), teacher)
    assert same_weights(model, original)
    assert list(model.state_dict()) == list(original.state_dict())
    trainable = [parameter.requires_grad for parameter in original.parameters()]
    assert [parameter.requires_grad for parameter in model.parameters()] == trainable

    resumed = recover(model, tokenizer(), settings(tmp_path / "half", **fields), teacher, resume=True)
    assert same_weights(resumed, uninterrupted)
    assert not same_weights(uninterrupted, original)


def test_a_fingerprint_ignores_fields_that_do_not_change_the_computation():
    model = build("llama-tied")
    expected = fingerprint(build("llama-tied"))

    model.name_or_path = "elsewhere"
    model.config.pad_token_id = 5
    model.config.use_cache = False  # a Trainer sets this field
    assert fingerprint(model) == expected


def test_a_fingerprint_depends_on_the_config_the_weights_and_their_dtype():
    expected = fingerprint(build("llama-tied"))
    with_other_epsilon = build("llama-tied")
    with_other_epsilon.config.rms_norm_eps *= 2

    assert fingerprint(with_other_epsilon) != expected
    assert fingerprint(with_changed_weight(build("llama-tied"))) != expected
    assert fingerprint(build("llama-tied").bfloat16()) != expected


def test_a_fingerprint_is_the_same_for_offloaded_weights():
    model = build("llama-tied")
    cpu_offload(model, execution_device=torch.device("cpu"))

    assert model.device.type == "meta"
    assert fingerprint(model) == fingerprint(build("llama-tied"))


@pytest.mark.parametrize("file", ["adapter", "optimizer"])
def test_a_full_disk_stops_the_training_and_leaves_the_model_unchanged(pruned, finished_run, tmp_path, file):
    room = 2_000
    if file == "optimizer":
        checkpoint = finished_run[0] / "checkpoint-8"
        adapter_bytes = (checkpoint / "adapter_model.safetensors").stat().st_size
        optimizer_bytes = (checkpoint / "optimizer.pt").stat().st_size
        room = (adapter_bytes + optimizer_bytes) // 2

    model = deepcopy(pruned)
    with full_disk(room), pytest.raises(StructPruneError, match=f"stopped at step 2, .*If {tmp_path}.* has no room"):
        recover(model, tokenizer(), settings(tmp_path))
    assert same_weights(model, pruned)
