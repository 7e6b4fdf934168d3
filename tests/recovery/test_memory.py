"""The memory and the time of a recovery are estimated from shapes, and a recovery that cannot fit is refused."""

import pytest
import torch
from helpers import recovery_config, unread
from models import build, config, tokenizer

from optimum_structprune import DomainConfig, RecoveryConfig, StructPruneError, dry_run, recover
from optimum_structprune.recovery.memory import estimate_recovery


def estimate(**fields):
    return estimate_recovery(RecoveryConfig(**fields), build("llama-tied"), build("llama-tied"), 1e9)


def test_full_training_needs_gradients_and_moments_of_all_weights():
    lora = estimate(tokens=10_000, seq_length=32)
    full = estimate(tokens=10_000, seq_length=32, train="full")

    assert full.trained == 4 * 4 * build("llama-tied").num_parameters()
    assert full.trained > lora.trained > 0
    assert full.total == full.weights + full.teacher + full.trained + full.activations


def test_time_is_proportional_to_the_tokens_and_memory_is_not():
    training = {"per_device_train_batch_size": 4}
    short = estimate(tokens=100_000, seq_length=32, training=training)
    long = estimate(tokens=1_000_000, seq_length=32, training=training)

    assert long.seconds == pytest.approx(10 * short.seconds)
    assert long.total == short.total


def test_checkpointed_activations_need_less_memory():
    plain = estimate(tokens=100_000, seq_length=64)
    checkpointed = estimate(tokens=100_000, seq_length=64, training={"gradient_checkpointing": True})
    assert checkpointed.activations < plain.activations


def test_a_dry_run_counts_the_weights_in_the_dtype_of_the_model():
    pruning = config(recovery=recovery_config(tokens=2_400))
    model_config = build("llama-tied").config
    single = dry_run(model_config, pruning, dtype=torch.float32).recovery
    half = dry_run(model_config, pruning, dtype=torch.bfloat16).recovery
    assert single.weights == 2 * half.weights


def test_a_dry_run_estimates_the_memory_of_a_recovery():
    model = build("llama-tied")
    outcome = dry_run(model.config, config(recovery=recovery_config(tokens=2_400)))

    assert outcome.recovery.seq_length == 24
    assert outcome.recovery.total > 0
    assert "the recovery takes" in str(outcome)
    assert "samples of 24 tokens" in str(outcome)

    with pytest.raises(StructPruneError, match="longer than the model's 64 positions"):
        dry_run(model.config, config(recovery=recovery_config(tokens=20_000, seq_length=65)))


def test_a_recovery_that_cannot_fit_is_refused_before_text_is_read(monkeypatch):
    monkeypatch.setattr("optimum_structprune.recovery.memory.free_bytes", lambda device: 1_000)
    settings = recovery_config(train="full", lora={}, domains=[DomainConfig("a", unread())])

    with pytest.raises(StructPruneError, match="The recovery takes at least .* are free. Set .*`train`='lora'"):
        recover(build("llama-tied"), tokenizer(), settings)
    with pytest.raises(StructPruneError, match="The recovery takes at least"):
        dry_run(build("llama-tied").config, config(recovery=settings), dtype=torch.float32)
