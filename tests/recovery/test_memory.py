"""The memory and the time of a recovery are estimated from shapes, and what cannot fit is refused."""

import pytest
import torch
from helpers import recovery_config, unread
from models import build, config, tokenizer

from optimum_structprune import DomainConfig, RecoveryConfig, StructPruneError, dry_run, recover
from optimum_structprune.recovery.memory import estimate_recovery


def estimate(flops=1e9, **fields):
    return estimate_recovery(RecoveryConfig(**fields), build("llama-tied"), build("llama-tied"), flops)


def test_full_training_takes_gradients_and_moments_of_all_weights():
    model = build("llama-tied")
    lora = estimate(tokens=10_000, seq_length=32)
    full = estimate(tokens=10_000, seq_length=32, train="full")
    assert full.trained == 4 * 4 * model.num_parameters() > lora.trained > 0
    assert full.total == full.weights + full.teacher + full.trained + full.activations


def test_time_follows_the_tokens_and_memory_does_not():
    few = estimate(tokens=100_000, seq_length=32, training={"per_device_train_batch_size": 4})
    many = estimate(tokens=1_000_000, seq_length=32, training={"per_device_train_batch_size": 4})
    assert many.seconds == pytest.approx(10 * few.seconds)
    assert many.total == few.total


def test_checkpointed_activations_take_less():
    whole = estimate(tokens=100_000, seq_length=64)
    checkpointed = estimate(tokens=100_000, seq_length=64, training={"gradient_checkpointing": True})
    assert checkpointed.activations < whole.activations


def test_a_dry_run_says_what_a_recovery_takes():
    model = build("llama-tied")
    plan = dry_run(model.config, config(recovery=recovery_config(tokens=2_400)))
    assert plan.recovery.seq_length == 24 and plan.recovery.total > 0
    assert "the recovery takes" in str(plan) and "samples of 24 tokens" in str(plan)
    with pytest.raises(StructPruneError, match="longer than the model's 64 positions"):
        dry_run(model.config, config(recovery=recovery_config(tokens=20_000, seq_length=65)))


def test_a_recovery_that_cannot_fit_is_refused_before_text_is_read(monkeypatch):
    monkeypatch.setattr("optimum_structprune.recovery.memory.free_bytes", lambda device: 1_000)
    settings = recovery_config(train="full", lora={}, domains=[DomainConfig("a", unread())])
    with pytest.raises(StructPruneError, match="The recovery takes at least .* are free. Set .*`train`='lora'"):
        recover(build("llama-tied"), tokenizer(), settings)
    with pytest.raises(StructPruneError, match="The recovery takes at least"):
        dry_run(build("llama-tied").config, config(recovery=settings), dtype=torch.float32)
