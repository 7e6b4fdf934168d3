"""Adapters and the models that they fit."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import set_seed

from ..config.fields import build
from ..config.recovery import LORA, RecoveryConfig
from ..errors import StructPruneError


if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


def lora_config(config: RecoveryConfig) -> LoraConfig:
    """The adapter that a recovery trains: `config.lora` laid over the defaults.

    Raises:
        StructPruneError: If peft does not know a field or refuses its value.
    """
    return build(LoraConfig, {**LORA, **config.lora})


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random numbers that follow a seed inside `with`.

    Those of Python, NumPy and torch go on afterwards as if nothing had been drawn.

    Args:
        seed: The seed of all of them.
    """
    python_state, numpy_state = random.getstate(), np.random.get_state()
    # Asking a GPU that nobody uses for its state would start it.
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=gpus):
        set_seed(seed)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


@contextmanager
def fresh_adapter(model: PreTrainedModel, lora: LoraConfig, seed: int) -> Iterator[PeftModel]:
    """The model with a new adapter, which a failure inside `with` takes off again.

    Random numbers follow the seed inside `with`, and go on afterwards as they were.

    Args:
        model: The model that gets the adapter. Its training mode and what of it is trainable are as before afterwards.
        lora: The kind of adapter.
        seed: The seed of the adapter's values.

    Raises:
        StructPruneError: If peft cannot put the adapter on this model.
    """
    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    training = model.training
    with seeded(seed):
        try:
            adapted = get_peft_model(model, lora)
        except (ValueError, TypeError) as error:
            raise StructPruneError(f"peft cannot put the adapter on {type(model).__name__}: {error}") from error
        try:
            yield adapted
        except BaseException:  # Ctrl-C too
            adapted.unload()
            raise
        finally:
            model.train(training)
            for name, parameter in model.named_parameters():
                parameter.requires_grad = trainable.get(name.replace(".base_layer.", "."), parameter.requires_grad)


def load_adapter(model: PreTrainedModel, folder: str | Path) -> PeftModel:
    """Put a saved adapter on the pruned model that it was trained on.

    Args:
        model: The pruned model; after a failure it is as it was.
        folder: The folder of the adapter that a recovery with `merge=False` saved.

    Raises:
        StructPruneError: If the folder holds no adapter, or the adapter was trained on a model of other widths; the
            message names the tensor and both shapes.
    """
    try:
        config = PeftConfig.from_pretrained(str(folder))
        adapted = get_peft_model(model, config)
    except ValueError as error:
        raise StructPruneError(f"{folder} holds no adapter for this model: {error}") from error
    try:
        set_peft_model_state_dict(adapted, check_adapter(adapted, folder))
    except StructPruneError:
        adapted.unload()
        raise
    return adapted


def check_adapter(adapted: PeftModel, folder: str | Path) -> dict[str, Tensor]:
    """Compare a saved adapter with the one on a model.

    Args:
        adapted: A model with an adapter.
        folder: The folder of the saved adapter.

    Returns:
        The saved tensors by name.

    Raises:
        StructPruneError: If a tensor is missing or has another shape.
    """
    path = Path(folder) / SAFETENSORS_WEIGHTS_NAME
    try:
        saved = load_file(path)
    except (OSError, SafetensorError) as error:
        raise StructPruneError(f"{path} is not a readable adapter: {error}") from error
    expected = get_peft_model_state_dict(adapted)
    for name in sorted({*saved, *expected}):
        there, here = (tuple(tensors[name].shape) if name in tensors else None for tensors in (saved, expected))
        if there != here:
            raise StructPruneError(
                f"The adapter in {folder} does not fit this model: {name} has shape {there} there, and this model "
                f"takes {here}. Load the pruned model that the adapter was trained on."
            )
    return saved
