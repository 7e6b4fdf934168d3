"""What only trained models and real text can show."""

import json
import subprocess
import sys
from math import log
from statistics import geometric_mean

import pytest
import torch
from trained import ROOT, SHARED, loss_ratio, needs_shared, smollm2_file, stories_config, stories_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_structprune import DomainConfig, StructPruneConfig, perplexity, prune_model
from optimum_structprune.evaluation.heldout import read_heldout
from optimum_structprune.search import search, trials


pytestmark = pytest.mark.nightly


@pytest.fixture(scope="module")
def stories():
    return stories_model()


@needs_shared
def test_a_trained_model_stays_one(stories):
    model, tokenizer = stories
    small = prune_model(model, stories_config(widths={"mlp": 128}, num_samples=32), tokenizer)
    prompt = tokenizer("Once upon a time, there was a little", return_tensors="pt")
    story = tokenizer.decode(small.generate(**prompt, max_new_tokens=12, do_sample=False)[0])
    assert any(word in story for word in ("girl", "boy", "bird", "dog", "cat", "bear", "bunny", "rabbit")), story


@needs_shared
@pytest.mark.parametrize("criterion", ["wanda", "flap", "obs"])
def test_refit_helps_every_criterion_and_criteria_beat_chance(stories, criterion):
    bare, refitted = (loss_ratio(stories, criterion=criterion, refit=refit) for refit in ("none", "least_squares"))
    assert refitted < 0.8 * bare
    assert bare < 0.7 * loss_ratio(stories, criterion="random", refit="none")


@needs_shared
def test_the_default_criterion_beats_wanda_where_attention_goes_too_and_rounds_do_not_drift(stories):
    both = {"widths": {"mlp": 128, "attention": 2}, "holdout": 0.5}
    assert loss_ratio(stories, **both) < 0.96 * loss_ratio(stories, criterion="wanda", **both)  # 0.937 measured
    assert loss_ratio(stories, widths={"attention": 2}) < loss_ratio(stories, widths={"attention": 2}, refit="none")
    assert loss_ratio(stories, rounds=4) < 1.03 * loss_ratio(stories)


@pytest.fixture(scope="module")
def smollm2():
    return smollm2_file()


def test_widths_by_measured_loss_beat_one_width(smollm2, monkeypatch):
    text = SHARED / "data" / "heldout"
    if not text.exists():
        pytest.skip(f"the text {text} is not here")
    monkeypatch.setattr(trials, "PROBE_TOKENS", 1024)
    monkeypatch.setattr(search, "TRIAL_TOKENS", 2048)
    model, tokenizer = (
        auto.from_pretrained(smollm2.parent, gguf_file=smollm2.name) for auto in (AutoModelForCausalLM, AutoTokenizer)
    )
    heldout = [DomainConfig(name=name, source=str(text / f"{name}.jsonl")) for name in ("wiki", "code")]
    samples = torch.cat([read_heldout(domain, tokenizer, 256, 8).samples for domain in heldout])
    dense = perplexity(model, samples)
    fields = {"widths": {"mlp": 1000}, "num_samples": 24, "seq_length": 256, "round_to": 8}
    loss = {
        allocation: log(
            perplexity(prune_model(model, StructPruneConfig(allocation=allocation, **fields), tokenizer), samples)
            / dense
        )
        for allocation in ("uniform", "sensitivity")
    }
    assert loss["sensitivity"] < 0.95 * loss["uniform"], loss


def test_the_demo_prunes_a_real_model(smollm2, tmp_path):
    assert smollm2.exists()
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "demo.py", "--output", tmp_path / "out", "--num-samples", "24"],
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert done.returncode == 0, done.stderr
    assert "  dense  right" in done.stdout and "  pruned wrong" in done.stdout and "report.html" in done.stdout
    assert len((done.stdout + done.stderr).splitlines()) < 40, done.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["sparsity"] == pytest.approx(0.2, abs=0.02)
    # Measured with 4 samples of each domain and 12 of the general text: prose 1.25, code 1.29, math 1.04,
    # general 1.98, geometric mean 1.35. Without the general half it was 1.13, 1.19 and 1.01 with 8 samples each.
    ratios = {name: values["after"] / values["before"] for name, values in report["perplexity"].items()}
    general = ratios.pop("general")
    assert geometric_mean(ratios.values()) < 1.3 and max(ratios.values()) < 1.4 and general < 2.2, ratios
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert small.config.intermediate_size < 1536 and torch.isfinite(small(torch.arange(8)[None]).logits).all()
