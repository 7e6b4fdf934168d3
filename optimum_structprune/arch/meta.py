"""A model without weights, from its config alone."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers import AutoModel, AutoModelForCausalLM

from ..errors import StructPruneError
from .families import family_of
from .heterogeneous import heterogeneous


if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def model_class(config: PretrainedConfig, arch_file: str | Path | None = None) -> Any:
    """What loads a model: the causal language model of its type, or the class that it was saved as where that is an
    encoder, an encoder-decoder or a multimodal model.
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
    """The model that a config describes, on the meta device: names and shapes, but no memory.

    Args:
        config: Of the model.
        arch_file: Descriptions of your own, see `families.yaml`.
        dtype: Of the parameters; None takes what the config says.
        trust_remote_code: Run code that comes with the model.

    Raises:
        StructPruneError: If transformers cannot build the model.
    """
    kind, config = model_class(config, arch_file), deepcopy(config)
    try:
        with torch.device("meta"), heterogeneous():
            if hasattr(kind, "from_config"):
                model = kind.from_config(config, trust_remote_code=trust_remote_code)
            else:
                model = kind(config)
    except ValueError as error:
        reason = str(error).strip().partition("\n")[0]
        raise StructPruneError(f"A {config.model_type} model cannot be built from its config: {reason}") from error
    return model.eval() if dtype is None else model.eval().to(dtype)


def skeleton(model: PreTrainedModel, config: PretrainedConfig) -> PreTrainedModel:
    """A model of the same class with `config`, on the meta device: shapes without memory."""
    with torch.device("meta"), heterogeneous():
        return type(model)(config)
