"""A recovery from a teacher cache trains as with the teacher, and later recoveries need no teacher."""

import os
import shutil
import signal
import subprocess
import sys
from copy import deepcopy
from dataclasses import replace
from functools import partial

import pytest
import torch
from helpers import RECOVERY_TEXT, flipped_bytes, on_one_rank, on_two_ranks, path_with_tests, same_weights
from models import build, documents, full_disk, tokenizer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from optimum_structprune import DomainConfig, Recovery, RecoveryConfig, StructPruneError, recover, write_teacher
from optimum_structprune.distillation.teacher_file_format import TEACHER_FILE_NAME, TeacherManifest, shard_name
from optimum_structprune.recovery.teacher_cache import RECORD_NAME, SAMPLES_NAME


CONFIG = RecoveryConfig(
    tokens=2048, seq_length=32, answer_share=0.5, training={"learning_rate": 1e-2}, **RECOVERY_TEXT
)


def recovered(pruned, folder=None, teacher=None, config=CONFIG):
    """Return a recovered copy of a model and the recovery."""
    recovery = Recovery(config)
    model = recovery.recover_model(deepcopy(pruned), tokenizer(), teacher, teacher_cache=folder)
    return model, recovery


@pytest.fixture(scope="module")
def teacher():
    """Return another teacher than the original model, so that even a short training is a gain."""
    return build("llama-tied", seed=1)


@pytest.fixture(scope="module")
def cache(small, teacher, tmp_path_factory):
    """Return the folder of a teacher cache that no test may change."""
    folder = tmp_path_factory.mktemp("cache") / "teacher"
    Recovery(CONFIG).cache_teacher(small, tokenizer(), teacher, folder)
    return folder


@pytest.fixture
def whole_distributions(monkeypatch):
    """Store all tokens, so that nothing is sampled."""
    vocab_size = build("llama-tied").config.vocab_size
    whole = partial(write_teacher, top=vocab_size, samples=0)
    monkeypatch.setattr("optimum_structprune.recovery.recover.write_teacher", whole)


@pytest.mark.slow
def test_a_recovery_from_whole_distributions_equals_a_recovery_with_the_teacher(
    pruned, teacher, tmp_path, whole_distributions
):
    # Adam would make full steps of gradients that are only rounding errors of the probabilities.
    config = replace(CONFIG, tokens=1024, training={"learning_rate": 0.1, "optim": "sgd", "save_strategy": "no"})
    expected, live = recovered(pruned, teacher=teacher, config=config)
    model, stored = recovered(pruned, tmp_path / "cache", teacher, config)

    assert not same_weights(model, pruned)
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(weight, expected.state_dict()[name], atol=2e-3, rtol=0)
    assert stored.report.domains.keys() == live.report.domains.keys()
    for name, result in live.report.domains.items():
        for figure, value in result.divergence.values.items():
            assert stored.report.domains[name].divergence.values[figure] == pytest.approx(value, abs=2e-3)
    assert [entry.documents for entry in stored.entries] == [entry.documents for entry in live.entries]


@pytest.mark.slow
def test_a_later_recovery_needs_no_teacher_and_no_text(pruned, cache, monkeypatch):
    def refuse(*args, **kwargs):
        pytest.fail("a teacher was loaded, or text was read")

    monkeypatch.setattr("optimum_structprune.recovery.recover.load_teacher", refuse)
    monkeypatch.setattr("optimum_structprune.recovery.recover.RecoveryData", refuse)
    config = replace(CONFIG, seed=1, training=CONFIG.training | {"learning_rate": 3e-3})

    model, recovery = recovered(pruned, cache, config=config)

    assert not same_weights(model, pruned)
    result = recovery.report.domains["answers"]
    assert result.divergence.values["recovered"] < result.divergence.values["pruned"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": 1024}, "another training: tokens 2048 there and 1024 here"),
        ({"seq_length": 16}, "seq_length 32 there and 16 here"),
        ({"answer_share": 0.25}, "answer_share 0.5 there and 0.25 here"),
        ({"domains": [DomainConfig(name="a", source=documents(200, seed=5))]}, "domains .* there and"),
        (
            {"domains": [replace(domain, source=documents(200, seed=7)) for domain in RECOVERY_TEXT["domains"]]},
            "another training: another text\\. Choose",
        ),
    ],
)
def test_other_settings_are_refused(pruned, cache, change, message):
    with pytest.raises(StructPruneError, match=message):
        recovered(pruned, cache, config=replace(CONFIG, **change))


def test_another_teacher_is_refused(pruned, cache, teacher, tmp_path):
    with pytest.raises(StructPruneError, match="predictions of another teacher"):
        recovered(pruned, cache, build("llama-tied", seed=3))
    build("llama-tied", seed=3).save_pretrained(tmp_path)
    with pytest.raises(StructPruneError, match="predictions of another teacher"):
        recovered(pruned, cache, str(tmp_path))


def test_other_folders_are_refused(pruned, tmp_path):
    with pytest.raises(StructPruneError, match="Pass the `teacher`"):
        recovered(pruned, tmp_path / "missing")
    pruned.save_pretrained(tmp_path / "model")
    with pytest.raises(StructPruneError, match="holds a model"):
        recovered(pruned, tmp_path / "model", build("llama-tied"))
    assert not (tmp_path / "missing").exists()


def test_a_version_of_the_future_is_refused(pruned, cache, tmp_path):
    later = tmp_path / "later"
    later.mkdir()
    for path in cache.iterdir():
        if path.is_file():
            (later / path.name).write_bytes(path.read_bytes())
    (later / RECORD_NAME).write_text(
        (cache / RECORD_NAME).read_text().replace('"format_version": 1', '"format_version": 9')
    )
    with pytest.raises(StructPruneError, match="format_version 9 is unknown"):
        recovered(pruned, later)


@pytest.mark.parametrize("name", [RECORD_NAME, SAMPLES_NAME, shard_name(0)])
def test_a_flipped_byte_is_noticed_before_a_step(pruned, cache, tmp_path, name):
    shutil.copytree(cache, tmp_path / "damaged")
    for _ in flipped_bytes(tmp_path / "damaged" / name, 5):
        with pytest.raises(StructPruneError, match="damaged|another|cannot be read|format_version|field"):
            recovered(pruned, tmp_path / "damaged")


@pytest.mark.parametrize("room", [1_000, 30_000])
def test_a_full_disk_is_one_error_and_the_next_run_goes_on(pruned, teacher, tmp_path, room, cache):
    folder = tmp_path / "cache"
    with full_disk(room), pytest.raises(StructPruneError, match="could not be written"):
        Recovery(CONFIG).cache_teacher(pruned, tokenizer(), teacher, folder)
    assert not (folder / TEACHER_FILE_NAME).exists()

    Recovery(CONFIG).cache_teacher(pruned, tokenizer(), teacher, folder)

    assert TeacherManifest.load(folder) == TeacherManifest.load(cache)
    for name in (SAMPLES_NAME, shard_name(0)):
        assert (folder / name).read_bytes() == (cache / name).read_bytes()


def test_the_call_of_recover_writes_the_cache(pruned, teacher, tmp_path):
    config = replace(CONFIG, tokens=512, answer_share=0.0, training=CONFIG.training | {"max_steps": 1})
    recover(pruned, tokenizer(), config, teacher, teacher_cache=tmp_path / "cache")
    assert TeacherManifest.load(tmp_path / "cache").teacher_sha256


TOGETHER = """
import os, sys
import torch
from dataclasses import replace
from models import build, config, tokenizer
from optimum_structprune import prune_model
from recovery.test_teacher_cache import CONFIG, recovered
from safetensors.torch import save_file

torch.set_num_threads(1)
processes = int(os.environ.get("WORLD_SIZE", 1))
training = {
    "learning_rate": 0.1, "optim": "sgd", "save_strategy": "no", "use_cpu": True,
    "per_device_train_batch_size": 4 // processes, "gradient_accumulation_steps": 1,
}
pruned = prune_model(build("llama-tied"), config(), tokenizer())
settings = replace(CONFIG, tokens=1024, training=training)
model, recovery = recovered(pruned, sys.argv[1], build("llama-tied", seed=1), settings)
if int(os.environ.get("RANK", 0)) == 0:
    save_file({name: weight.clone() for name, weight in model.state_dict().items()}, sys.argv[2])
"""


@pytest.mark.slow
def test_two_processes_write_a_cache_and_train_from_it_as_one_process(tmp_path):
    for name, run in (("one", on_one_rank), ("two", on_two_ranks)):
        (tmp_path / name).mkdir()
        run(TOGETHER, tmp_path / name, tmp_path / name / "cache", tmp_path / name / "weights")

    assert TeacherManifest.load(tmp_path / "two" / "cache") == TeacherManifest.load(tmp_path / "one" / "cache")
    weights = load_file(tmp_path / "two" / "weights")
    for name, weight in load_file(tmp_path / "one" / "weights").items():
        torch.testing.assert_close(weights[name], weight, atol=1e-4, rtol=0)


KILLED = """
import os, signal, sys
from models import tokenizer
from optimum_structprune import Recovery
from recovery.test_teacher_cache import saving
from transformers import AutoModelForCausalLM, Trainer

training_step = Trainer.training_step

def killed(trainer, *args, **kwargs):
    if trainer.state.global_step == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return training_step(trainer, *args, **kwargs)

Trainer.training_step = killed
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
Recovery(saving(sys.argv[3])).recover_model(model, tokenizer(), teacher_cache=sys.argv[2])
"""


def saving(folder):
    """Return a config that saves a checkpoint every second step."""
    training = CONFIG.training | {"output_dir": str(folder), "save_steps": 2, "max_steps": 8}
    return replace(CONFIG, training=training)


@pytest.mark.slow
def test_a_training_that_is_killed_resumes_from_the_cache_to_the_same_weights(small, teacher, tmp_path):
    # A model from a folder has no calibration text in memory, so the cache of the other tests is refused.
    small.save_pretrained(tmp_path / "model")
    cache = tmp_path / "cache"
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    Recovery(CONFIG).cache_teacher(saved, tokenizer(), teacher, cache)
    arguments = [tmp_path / "model", cache, tmp_path / "killed"]
    process = subprocess.run(
        [sys.executable, "-c", KILLED, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"PYTHONPATH": path_with_tests()},
    )
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert (tmp_path / "killed" / "checkpoint-4").is_dir()

    def trained(folder, resume):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
        return Recovery(saving(folder)).recover_model(model, tokenizer(), resume=resume, teacher_cache=cache)

    resumed = trained(tmp_path / "killed", True)
    assert same_weights(resumed, trained(tmp_path / "whole", False))
    assert not same_weights(resumed, small)
