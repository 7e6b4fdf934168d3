"""A recovery from a teacher cache trains as with the teacher, and later recoveries need no teacher."""

from copy import deepcopy
from dataclasses import replace
from functools import partial

import pytest
import torch
from helpers import RECOVERY_TEXT, same_weights
from models import build, documents, full_disk, tokenizer

from optimum_structprune import DomainConfig, Recovery, RecoveryConfig, StructPruneError, recover, write_teacher
from optimum_structprune.recovery.teacher_cache import RECORD_NAME, SAMPLES_NAME
from optimum_structprune.recovery.teacher_file import TEACHER_FILE_NAME, TeacherManifest, shard_name


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
            "text_sha256 .* there",
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
