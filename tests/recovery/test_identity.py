"""Checkpoints and a teacher's predictions are taken up by the training that they belong to, and by no other."""

import json
from copy import deepcopy

import pytest
import torch
from accelerate import cpu_offload
from helpers import RECOVERY_TEXT, logits, recovery_config
from models import build, config, full_disk, tokenizer

from optimum_structprune import Recovery, StructPruneError, prune_model, recover
from optimum_structprune.recovery.identity import IDENTITY_NAME, weights_hash
from optimum_structprune.recovery.teacher import INDEX_NAME


@pytest.fixture(scope="module")
def pruned():
    return prune_model(build("llama-tied"), config(), tokenizer())


@pytest.fixture(scope="module")
def run(pruned, tmp_path_factory):
    """The folder of a training, and what came of it."""
    folder = tmp_path_factory.mktemp("run")
    return folder, recover(deepcopy(pruned), tokenizer(), settings(folder))


def settings(folder, **fields):
    training = {"output_dir": str(folder), "save_steps": 4, "save_total_limit": 5, **fields.pop("training", {})}
    return recovery_config(**{"tokens": 192, **fields}, training=training)


def other_weights(model):
    model = deepcopy(model)
    with torch.no_grad():
        model.model.norm.weight[0] += 1
    return model


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lora": {"r": 2, "lora_alpha": 64}}, "lora.lora_alpha=32 there and 64 here"),
        ({"training": {"learning_rate": 0.5}}, "learning_rate=0.01 there and 0.5 here"),
        ({"temperature": 2.0}, "temperature=1.0 there and 2.0 here"),
        ({"tokens": 96}, r"text \w{12}… there and \w{12}… here"),
        ({"domains": RECOVERY_TEXT["domains"][:1]}, "text"),
    ],
)
def test_a_checkpoint_of_another_training_is_refused(pruned, run, fields, message):
    with pytest.raises(StructPruneError, match=f"checkpoint-4 belongs to another training: .*{message}"):
        recover(deepcopy(pruned), tokenizer(), settings(run[0], **fields), resume=True)


def test_a_checkpoint_of_another_model_or_teacher_is_refused(pruned, run):
    message = r"model \w{12}… there and \w{12}… here"
    with pytest.raises(StructPruneError, match=message):
        recover(other_weights(pruned), tokenizer(), settings(run[0]), resume=True)
    with pytest.raises(StructPruneError, match=r"teacher None there and \w{12}… here"):
        recover(deepcopy(pruned), tokenizer(), settings(run[0]), build("llama-tied"), resume=True)


def test_what_changes_no_step_may_differ_and_an_old_checkpoint_warns(pruned, run):
    folder, expected = run
    same = settings(folder, training={"logging_steps": 1, "save_steps": 2})
    resumed = recover(deepcopy(pruned), tokenizer(), same, resume=True)
    torch.testing.assert_close(logits(resumed), logits(expected))
    for path in folder.glob(f"*/{IDENTITY_NAME}"):
        path.unlink()
    with pytest.warns(UserWarning, match="does not say which training it belongs to"):
        recover(deepcopy(pruned), tokenizer(), same, resume=True)


def test_predictions_of_another_teacher_are_refused(pruned, tmp_path):
    settings = recovery_config(tokens=96, top_k=7, teacher_logits=str(tmp_path / "logits"))
    teacher = build("llama-tied")
    Recovery(settings).write_teacher_logits(teacher, tokenizer())
    Recovery(settings).write_teacher_logits(deepcopy(teacher), tokenizer())
    message = r"written by the model \w{12}…, and the teacher of this run is \w{12}…"
    with pytest.raises(StructPruneError, match=message):
        recover(deepcopy(pruned), tokenizer(), settings, teacher=other_weights(teacher))
    index = json.loads((tmp_path / "logits" / INDEX_NAME).read_text())
    assert index.pop("teacher") == weights_hash(teacher)
    (tmp_path / "logits" / INDEX_NAME).write_text(json.dumps(index))
    with pytest.warns(UserWarning, match="do not say whose they are"):
        Recovery(settings).write_teacher_logits(other_weights(teacher), tokenizer())


def test_a_model_keeps_its_hash_where_accelerate_has_put_its_weights_away():
    model = build("llama-tied")
    expected = weights_hash(model)
    assert weights_hash(other_weights(model)) != expected
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.device.type == "meta" and weights_hash(model) == expected


def test_an_optimizer_that_does_not_fit_on_the_disk(pruned, run, tmp_path):
    sizes = {path.name: path.stat().st_size for path in run[0].glob("checkpoint-4/*")}
    with (
        full_disk((sizes["adapter_model.safetensors"] + sizes["optimizer.pt"]) // 2),
        pytest.raises(StructPruneError, match="stopped at step 4 because a checkpoint could not be written"),
    ):
        recover(deepcopy(pruned), tokenizer(), settings(tmp_path))
