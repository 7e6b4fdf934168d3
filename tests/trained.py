"""A tiny trained model and its kind of text, where perplexity means something."""

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
    """The trained model (FFN 172) and its tokenizer."""
    return AutoModelForCausalLM.from_pretrained(MODEL), AutoTokenizer.from_pretrained(MODEL)


# What `loss_ratio` has measured, by config: several tests compare with the same pruning.
RATIOS: dict[str, float] = {}


def loss_ratio(stories, **fields) -> float:
    """Perplexity on held-out stories after pruning, as a multiple of the dense model's."""
    config = stories_config(**{"widths": {"mlp": 128}, "num_samples": 32, "seq_length": 256, **fields})
    key = json.dumps(config.to_dict(), sort_keys=True)
    if key not in RATIOS:
        pruner = StructPruner(config)
        pruner.prune_model(*stories)
        RATIOS[key] = pruner.report.domains["stories"].perplexity.ratio
    return RATIOS[key]


def stories_config(**fields) -> StructPruneConfig:
    """Prunes the FFN to 96 channels, calibrated on stories."""
    defaults = {"widths": {"mlp": 96}, "general_share": 0.0, "num_samples": 16, "seq_length": 128}
    return StructPruneConfig(**{**defaults, "domains": [DomainConfig(name="stories", source=str(STORIES))], **fields})
