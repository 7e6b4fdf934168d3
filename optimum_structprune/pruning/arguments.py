"""What is not what a parameter takes, found before anything is done with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..config.pruning import StructPruneConfig
from ..errors import StructPruneError


def check_config_kind(config: Any) -> None:
    """Refuse what is no config, such as a mapping or a tokenizer."""
    if not isinstance(config, StructPruneConfig):
        raise StructPruneError(
            f"config takes a StructPruneConfig, got {type(config).__name__}; a mapping becomes one with "
            "StructPruneConfig.from_dict."
        )


def check_arguments(model: Any, tokenizer: Any, inputs: Any) -> None:
    """Refuse a model, a tokenizer or inputs of another kind than a pruning takes."""
    if not (isinstance(model, nn.Module) and hasattr(model, "config")):
        raise StructPruneError(
            f"model takes a model of transformers, got {type(model).__name__}; load it with from_pretrained first."
        )
    if not (tokenizer is None or callable(tokenizer)):
        raise StructPruneError(
            f"tokenizer takes a tokenizer, got {type(tokenizer).__name__}; load it with AutoTokenizer.from_pretrained."
        )
    if inputs is None:
        return
    if not isinstance(inputs, Mapping):
        raise StructPruneError(
            f"inputs takes a mapping of names to tensors, such as {{'text': ids}}, got {type(inputs).__name__}."
        )
    for name, samples in inputs.items():
        _check_samples(name, samples, model.config)


def _check_samples(name: str, samples: Any, model_config: Any) -> None:
    if not isinstance(samples, torch.Tensor):
        raise StructPruneError(f"inputs[{name!r}] takes a tensor, got {type(samples).__name__}.")
    if samples.dim() < 2:
        raise StructPruneError(
            f"inputs[{name!r}] has the shape {tuple(samples.shape)}; (samples, …) is expected, with two dimensions "
            "or more."
        )
    vocab_size = getattr(model_config.get_text_config(), "vocab_size", None)
    if samples.is_floating_point() or vocab_size is None or not samples.numel():
        return
    least, most = int(samples.min()), int(samples.max())
    if not 0 <= least <= most < vocab_size:
        raise StructPruneError(
            f"inputs[{name!r}] holds token ids from {least} to {most}, and those of this model lie between 0 and "
            f"{vocab_size - 1}."
        )
