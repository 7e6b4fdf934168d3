"""A tiny trained model and its kind of text, where perplexity means something."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_structprune import DomainConfig, StructPruneConfig


SHARED = Path(os.environ.get("STRUCTPRUNE_SHARED", Path(__file__).parents[2] / "shared"))
MODEL = SHARED / "models" / "stories260K"
STORIES = SHARED / "data" / "calibration" / "stories.jsonl"
needs_shared = pytest.mark.skipif(
    not (MODEL.is_dir() and STORIES.is_file()),
    reason=f"no trained model in {SHARED}; STRUCTPRUNE_SHARED names the folder",
)


def stories_model():
    """The trained model (FFN 172) and its tokenizer."""
    return AutoModelForCausalLM.from_pretrained(MODEL), AutoTokenizer.from_pretrained(MODEL)


def stories_config(**fields) -> StructPruneConfig:
    """Prunes the FFN to 96 channels, calibrated on stories."""
    defaults = {"widths": {"mlp": 96}, "num_samples": 16, "seq_length": 128}
    return StructPruneConfig(**{**defaults, "domains": [DomainConfig(name="stories", source=str(STORIES))], **fields})
