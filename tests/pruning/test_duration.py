"""The time of a pruning grows with its work, and falls with the speed of the device."""

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


def estimated(settings=SETTINGS, throughput=1e9, name="llama-tied"):
    model = build(name)
    request = PruningRequest(settings, ModelInfo(describe(model), model, model.device))
    return estimate_time(request, throughput)


def test_the_total_is_the_sum_of_the_stages():
    estimate = estimated()
    assert estimate.total == pytest.approx(sum(getattr(estimate, stage) for stage in STAGES))
    assert all(f"{stage} " in str(estimate) for stage in STAGES)


def test_twice_the_speed_halves_each_stage():
    slow, fast = estimated(throughput=1e9), estimated(throughput=2e9)
    for stage in STAGES:
        assert getattr(slow, stage) == pytest.approx(2 * getattr(fast, stage))


def test_twice_the_text_doubles_calibration_and_evaluation_but_no_refit():
    once, twice = estimated(), estimated(replace(SETTINGS, num_samples=128))
    assert twice.calibration == pytest.approx(2 * once.calibration)
    assert twice.evaluation == pytest.approx(2 * once.evaluation, rel=0.01)
    assert twice.refit == once.refit > 0


def test_each_round_calibrates_and_refits_again():
    once, thrice = estimated(), estimated(replace(SETTINGS, rounds=3))
    assert thrice.calibration == pytest.approx(3 * once.calibration)
    assert thrice.refit == pytest.approx(3 * once.refit)
    assert thrice.evaluation == once.evaluation


def test_text_that_the_model_writes_takes_time():
    given = estimated()
    written = estimated(replace(SETTINGS, general_share=0.5, general_text="self:code"))
    assert written.writing > 2 * given.writing
    # An encoder writes nothing.
    assert estimated(name="bert").writing == 0


def test_without_a_refit_only_calibration_and_evaluation_take_time():
    estimate = estimated(replace(SETTINGS, criterion="wanda", refit="none", general_share=0.0))
    assert estimate.refit == 0 and estimate.calibration < estimated().calibration


def test_a_dry_run_estimates_the_time_if_it_is_asked():
    settings = config(domains=TEXT)
    assert dry_run(build("llama-tied").config, settings).time is None
    estimate = dry_run(build("llama-tied").config, settings, cost=True)
    assert estimate.time.total > 0
    assert "time on this " in str(estimate) and estimate.to_dict()["time"]["refit"] > 0


def test_the_measured_speed_is_positive():
    assert measured_throughput(torch.device("cpu"), torch.float32, 32, 64, seconds=0.01) > 0
