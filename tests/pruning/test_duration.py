"""The estimated time of a pruning grows with its work, and falls with the speed of the device."""

from dataclasses import replace

import pytest
import torch
from models import build, config

from optimum_structprune import DomainConfig, StructPruneConfig
from optimum_structprune.arch.load import ModelInfo, describe
from optimum_structprune.dryrun import dry_run
from optimum_structprune.method.devices import measured_throughput
from optimum_structprune.pruning.duration import estimate_time
from optimum_structprune.pruning.request import PruningRequest


STAGES = ("writing", "calibration", "refit", "evaluation")
TEXT = [DomainConfig(name="a", source="builtin:math")]
SETTINGS = StructPruneConfig(widths={"mlp": 24}, num_samples=64, seq_length=64, domains=TEXT, general_share=0.0)


def estimate(settings=SETTINGS, throughput=1e9, name="llama-tied"):
    """Return the estimated time of a pruning on a device with this throughput."""
    model = build(name)
    request = PruningRequest(settings, ModelInfo(describe(model), model, model.device))
    return estimate_time(request, throughput)


def test_the_total_is_the_sum_of_the_stages():
    time = estimate()
    assert time.total == pytest.approx(sum(getattr(time, stage) for stage in STAGES))
    assert all(f"{stage} " in str(time) for stage in STAGES)


def test_twice_the_speed_halves_each_stage():
    slow = estimate(throughput=1e9)
    fast = estimate(throughput=2e9)

    for stage in STAGES:
        assert getattr(slow, stage) == pytest.approx(2 * getattr(fast, stage))


def test_twice_the_text_doubles_calibration_and_evaluation_but_no_refit():
    time = estimate()
    time_with_twice_the_text = estimate(replace(SETTINGS, num_samples=128))

    assert time_with_twice_the_text.calibration == pytest.approx(2 * time.calibration)
    assert time_with_twice_the_text.evaluation == pytest.approx(2 * time.evaluation, rel=0.01)
    assert time_with_twice_the_text.refit == time.refit
    assert time.refit > 0


def test_each_round_repeats_calibration_and_refit():
    one_round = estimate()
    three_rounds = estimate(replace(SETTINGS, rounds=3))

    assert three_rounds.calibration == pytest.approx(3 * one_round.calibration)
    assert three_rounds.refit == pytest.approx(3 * one_round.refit)
    assert three_rounds.evaluation == one_round.evaluation


def test_text_that_the_model_writes_takes_time():
    from_files = estimate()
    from_model = estimate(replace(SETTINGS, general_share=0.5, general_text="self:code"))
    assert from_model.writing > 2 * from_files.writing

    # An encoder writes nothing.
    assert estimate(name="bert").writing == 0


def test_without_a_refit_only_calibration_and_evaluation_take_time():
    time = estimate(replace(SETTINGS, criterion="wanda", refit="none", general_share=0.0))
    assert time.refit == 0
    assert time.calibration < estimate().calibration


def test_a_dry_run_estimates_the_time_on_request():
    settings = config(domains=TEXT)
    assert dry_run(build("llama-tied").config, settings).time is None

    result = dry_run(build("llama-tied").config, settings, cost=True)
    assert result.time.total > 0
    assert "time on this " in str(result)
    assert result.to_dict()["time"]["refit"] > 0


def test_the_measured_speed_is_positive():
    assert measured_throughput(torch.device("cpu"), torch.float32, 32, 64, seconds=0.01) > 0
