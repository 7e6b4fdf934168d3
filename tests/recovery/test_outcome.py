"""A training that makes a model worse is told, and its report is at hand."""

from copy import deepcopy
from dataclasses import asdict
from math import inf, nan
from types import SimpleNamespace

import pytest
import torch
from helpers import recovery_config
from models import build, config, tokenizer

from optimum_structprune import prune_model, recover
from optimum_structprune.recovery.trainer import DistillTrainer, RecoveryOutcome, WorseModelWarning


@pytest.mark.parametrize(
    ("after", "worse"),
    [((8.0, 20.0), False), ((12.5, 8.0), False), ((12.6, 8.0), True), ((10.0, 10.0), False), ((8, nan), True)]
    + [((8.0, inf), True)],
)
def test_the_mean_log_perplexity_decides(after, worse, recwarn):
    perplexity = {name: {"pruned": 10.0, "recovered": value} for name, value in zip("ab", after, strict=True)}
    if after == (8.0, 20.0):
        perplexity["b"]["pruned"] = 20.0
    outcome = RecoveryOutcome(perplexity=perplexity, learning_rate=0.5)
    outcome.judge()
    assert outcome.worse == worse == asdict(outcome)["worse"] == ("Recovery made" in str(outcome))
    assert [warning.category for warning in recwarn] == [WorseModelWarning] * worse


def test_a_destroyed_model_is_told_with_both_perplexities_and_the_rate(recwarn):
    pruned = prune_model(build("llama-tied"), config(), tokenizer())
    settings = recovery_config(tokens=192, train="full", lora={}, training={"learning_rate": 1.0})
    recovered, report = recover(deepcopy(pruned), tokenizer(), settings, return_report=True)
    before, after = (report.mean_log_perplexity(when) for when in ("pruned", "recovered"))
    assert report.worse and after > before and recovered.config.intermediate_size == 24
    told = [str(warning.message) for warning in recwarn if warning.category is WorseModelWarning]
    assert len(told) == 1 and "held-out text was" in told[0] and "below 1 may help" in told[0]


def test_tokens_are_those_of_the_text():
    # Of two processes with 4 samples each, the last batch of 10 samples is filled up.
    samples = [{"input_ids": torch.zeros(24)}] * 10
    for epoch, seen, tokens in ((1.0, 16 * 24, 240), (0.5, 8 * 24, 192), (2.0, 32 * 24, 480)):
        trainer = SimpleNamespace(
            train_dataset=samples, state=SimpleNamespace(epoch=epoch, num_input_tokens_seen=seen)
        )
        assert DistillTrainer.tokens_seen(trainer) == tokens
