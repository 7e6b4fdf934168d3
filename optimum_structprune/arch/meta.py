"""A model without weights, from its config alone."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from transformers import AutoModel, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from ..errors import StructPruneError
from .families import family_of
from .per_layer import heterogeneous


def model_class(config: PretrainedConfig, arch_file: str | Path | None = None) -> Any:
    """The class that loads a model: the causal language model of its type, or for an encoder, an encoder-decoder and a
    multimodal model the class that it was saved as.
    """
    try:
        family = family_of(config.model_type, arch_file)
    except StructPruneError:
        return AutoModelForCausalLM
    if family.causal and family.text is None:
        return AutoModelForCausalLM
    return getattr(transformers, (config.architectures or ["AutoModel"])[0], AutoModel)


def meta_model(
    config: PretrainedConfig,
    arch_file: str | Path | None = None,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The model that a config describes, on the meta device: names and shapes, but no memory."""
    kind, config = model_class(config, arch_file), deepcopy(config)
    try:
        with torch.device("meta"), heterogeneous():
            if hasattr(kind, "from_config"):
                model = kind.from_config(config, trust_remote_code=trust_remote_code)
            else:
                model = kind(config)
    except Exception as error:  # a hundred classes fail, each in a way of its own
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise StructPruneError(f"A {config.model_type} model cannot be built from its config: {reason}") from error
    return model.eval() if dtype is None else model.eval().to(dtype)


def skeleton(model: PreTrainedModel, config: PretrainedConfig, buffers: bool = False) -> PreTrainedModel:
    """A model of the same class with another config, on the meta device: shapes without memory."""
    device = init_empty_weights(include_buffers=False) if buffers else torch.device("meta")
    with device, heterogeneous():
        return type(model)(config)
