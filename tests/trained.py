"""A tiny trained model and its kind of text, for tests that need a meaningful perplexity."""

import json
import os
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_structprune import DomainConfig, StructPruneConfig, StructPruner


ROOT = Path(__file__).parents[1]
SHARED = Path(os.environ.get("STRUCTPRUNE_SHARED", ROOT.parent / "shared"))
MODEL = SHARED / "models" / "stories260K"
STORIES = SHARED / "data" / "calibration" / "stories.jsonl"
needs_shared = pytest.mark.skipif(
    not (MODEL.is_dir() and STORIES.is_file()),
    reason=f"no trained model in {SHARED}; STRUCTPRUNE_SHARED names the folder",
)


def stories_model():
    """Return the trained model, whose FFN width is 172, and its tokenizer."""
    return AutoModelForCausalLM.from_pretrained(MODEL), AutoTokenizer.from_pretrained(MODEL)


# The results of `loss_ratio` by config, because several tests compare with the same pruning.
RATIOS: dict[str, float] = {}


def loss_ratio(stories, **fields) -> float:
    """Return the perplexity on held-out stories after pruning, divided by the perplexity before."""
    defaults = {"widths": {"mlp": 128}, "num_samples": 32, "seq_length": 256}
    config = stories_config(**(defaults | fields))
    key = json.dumps(config.to_dict(), sort_keys=True)
    if key not in RATIOS:
        pruner = StructPruner(config)
        pruner.prune_model(*stories)
        RATIOS[key] = pruner.result.report.domains["stories"].perplexity.ratio
    return RATIOS[key]


def stories_config(**fields) -> StructPruneConfig:
    """Return a config that prunes the FFN to 96 channels, calibrated on stories."""
    domains = [DomainConfig(name="stories", source=str(STORIES))]
    defaults = {"widths": {"mlp": 96}, "general_share": 0.0, "num_samples": 16, "seq_length": 128, "domains": domains}
    return StructPruneConfig(**(defaults | fields))
