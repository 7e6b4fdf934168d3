"""What of a model is trained: an adapter that fits it, or all of its weights."""

from __future__ import annotations

import logging
import random
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

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
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel, set_seed

from ..arch.meta import skeleton
from ..config.fields import build
from ..config.recovery import LORA, RecoveryConfig
from ..errors import InPlaceError, StructPruneError, warn
from ..forward.metrics import evaluating, input_device
from ..system.fingerprint import computing
from .resume import DIGITS, model_of, weights_hash


logger = logging.getLogger(__name__)


def lora_config(config: RecoveryConfig) -> LoraConfig:
    """The adapter that a recovery trains: `config.lora` laid over the defaults."""
    adapter = build(LoraConfig, {**LORA, **config.lora})
    # peft finds these only once it places the adapter.
    if not (isinstance(adapter.r, int) and adapter.r >= 1):
        raise StructPruneError(f"LoraConfig: r has to be 1 or more, got {adapter.r!r}.")
    if not (isinstance(adapter.lora_dropout, (int, float)) and 0 <= adapter.lora_dropout < 1):
        raise StructPruneError(f"LoraConfig: lora_dropout has to lie between 0 and 1, got {adapter.lora_dropout!r}.")
    return adapter


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random numbers of Python, NumPy and torch follow a seed inside `with`, and go on afterwards as they were."""
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


# What peft raises where an adapter does not go with a model, or a field of its config has a wrong type.
PEFT_ERRORS = (ValueError, TypeError, AttributeError, KeyError, RuntimeError, ImportError, AssertionError, re.error)
WRAPPERS = (BaseTunerLayer, AuxiliaryTrainingWrapper)
# The number of tokens on which the outputs before and after merging are compared.
COMPARED_TOKENS = 64


@contextmanager
def fresh_adapter(model: PreTrainedModel, kind: PeftConfig, seed: int, merge: bool = True) -> Iterator[PeftModel]:
    """The model with a new adapter, which a failure inside `with` takes off again; random numbers follow the seed."""
    training, trainable = model.training, trainable_of(model)
    with seeded(seed):
        try:
            adapted = _adapted(model, kind, merge)
            yield adapted
        except BaseException:  # Ctrl-C too
            _take_off_(model, trainable)
            model.train(training)
            raise
    adapted.train(training)
    if merge:
        set_trainable_(model, trainable)


@contextmanager
def every_weight(model: PreTrainedModel, seed: int) -> Iterator[PreTrainedModel]:
    """The model with all weights trainable; a failure gives them their old values; random numbers follow a seed."""
    training, trainable = model.training, trainable_of(model)
    before = {name: parameter.detach().to("cpu", copy=True) for name, parameter in model.named_parameters()}
    try:
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        with seeded(seed):
            yield model
    except BaseException:  # Ctrl-C too
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(before[name])
        raise
    finally:
        model.zero_grad()
        set_trainable_(model, trainable)
        model.train(training)


def check_fits(model: PreTrainedModel, kind: LoraConfig, merge: bool = True) -> None:
    """Refuse an adapter that cannot be put on a model of the same kind without weights."""
    kind = deepcopy(kind)
    kind.init_lora_weights = True  # others look at the weights
    try:
        empty = skeleton(model, deepcopy(model.config))
        with torch.device("meta"):
            _adapted(empty, kind, merge)
    except StructPruneError as error:
        if error.__cause__ is None or isinstance(error.__cause__, ValueError):
            raise
    except Exception as error:  # a model class with an unusual constructor says nothing about the adapter
        logger.debug("the adapter is not tried before: %s", error)


def _adapted(model: PreTrainedModel, config: PeftConfig, merge: bool) -> PeftModel:
    tied = _tied(model)
    with warnings.catch_warnings():
        # peft warns of tied weights; where that matters, it is refused below.
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings.*")
        # It looks up by itself how a module stores its weight, and says so.
        warnings.filterwarnings("ignore", message=".*fan_in_fan_out.*")
        try:
            adapted = get_peft_model(model, config)
        except PEFT_ERRORS as error:
            raise StructPruneError(f"peft cannot put the adapter on {type(model).__name__}: {error}") from error
    if merge:
        _check_tied(adapted, tied)
    return adapted


def _tied(model: PreTrainedModel) -> dict[int, list[str]]:
    """The names of the weights that share one tensor, by its id."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {key: shared for key, shared in names.items() if len(shared) > 1}


def _check_tied(adapted: PeftModel, tied: Mapping[int, list[str]]) -> None:
    # What peft merges into a tied weight changes it in all of its places, and was trained in one of them. Its
    # `ensure_weight_tying` trains in both and merges both, one on top of the other.
    for module in adapted.modules():
        for parameter in _under(module).parameters() if isinstance(module, WRAPPERS) else ():
            if names := tied.get(id(parameter)):
                raise StructPruneError(
                    f"The adapter would train {names[0]}, which is one tensor with {', '.join(names[1:])}, so that "
                    "the merged model would not be the one that was trained; leave it out of lora['target_modules'] "
                    "and lora['modules_to_save'], or keep the adapter with merge=False."
                )


def trainable_of(model: PreTrainedModel) -> dict[str, bool]:
    """Whether each parameter is trained, by name."""
    return {name: parameter.requires_grad for name, parameter in model.named_parameters()}


def set_trainable_(model: PreTrainedModel, trainable: Mapping[str, bool]) -> None:
    """Make trainable what `trainable_of` says, also where an adapter has been put around it."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad = trainable.get(name.replace(".base_layer.", "."), parameter.requires_grad)


def _take_off_(model: PreTrainedModel, trainable: Mapping[str, bool]) -> None:
    """Take off what peft has put on a model; its own `unload` needs an adapter that stands."""
    _unwrap_(model)
    if hasattr(model, "peft_config"):
        del model.peft_config
    set_trainable_(model, trainable)


def _unwrap_(parent: nn.Module) -> None:
    for name, child in list(parent.named_children()):
        while isinstance(child, WRAPPERS):
            child = _under(child)
            setattr(parent, name, child)
        _unwrap_(child)


def _under(wrapper: Any) -> nn.Module:
    return wrapper.get_base_layer() if isinstance(wrapper, BaseTunerLayer) else wrapper.original_module


@torch.no_grad()
def merge_adapter_(adapted: PeftModel, samples: Tensor) -> PreTrainedModel:
    """The model under an adapter, which is folded into its weights; samples have the shape `(samples, seq_length)`."""
    ids = samples[:1, :COMPARED_TOKENS]
    trained = _logits(adapted, ids)
    merged = adapted.merge_and_unload()
    distance = float((_logits(merged, ids) - trained).norm() / trained.norm())
    # The sum of base and adapter is rounded once more. That takes logits apart by about a step of the dtype times the
    # root of the number of layers, while an adapter that is merged wrongly takes them apart by 0.1 and more.
    limit = 2 * torch.finfo(merged.dtype).eps ** 0.5
    if distance > limit:
        raise InPlaceError(
            f"The merged model gives other outputs than the one that was trained: they differ by {distance:.2g} of "
            f"their size, and {limit:.2g} is rounding. Load the pruned model again, and keep the adapter with "
            "merge=False."
        )
    return merged


def _logits(model: PreTrainedModel | PeftModel, ids: Tensor) -> Tensor:
    with evaluating(model):
        return model(input_ids=ids.to(input_device(model)), use_cache=False).logits.float()


def source_of(model: PreTrainedModel) -> str:
    """The name that a model was loaded by; empty where it is of other sizes by now, as after a pruning in memory."""
    try:
        there = type(model.config).from_pretrained(name := model.name_or_path or "")
    except (OSError, ValueError):
        return ""
    return name if computing(there) == computing(model.config) else ""


@contextmanager
def based_on(adapted: PeftModel, name: str) -> Iterator[None]:
    """Inside `with`, an adapter and its card say that they belong to the model of this name; an empty one is none."""
    model: Any = adapted.get_base_model()
    before = model.name_or_path
    for kind in adapted.peft_config.values():
        kind.base_model_name_or_path = name
    model.name_or_path = model.config._name_or_path = name
    try:
        yield
    finally:
        model.name_or_path = model.config._name_or_path = before


def load_adapter(model: PreTrainedModel, folder: str | Path, is_trainable: bool = False) -> PeftModel:
    """Put a saved adapter on the pruned model that it was trained on.

    As with `PeftModel.from_pretrained`, the weights of the model are frozen afterwards.

    Args:
        model: The pruned model; after a failure it is as it was.
        folder: The folder of the adapter that a recovery with `merge=False` saved.
        is_trainable: Whether the adapter can be trained on; otherwise it is frozen too, and the model is in eval mode.

    Raises:
        StructPruneError: If the folder holds no adapter, or the adapter was trained on another model. The message
            names the tensor and both shapes where the widths differ, and both hashes where the weights do.
    """
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except PEFT_ERRORS as error:
        raise StructPruneError(f"{folder} holds no adapter for this model: {error}") from error
    config.inference_mode = not is_trainable
    trainable, base = trainable_of(model), weights_hash(model)
    try:
        adapted = _adapted(model, config, merge=False)
        saved = check_adapter(adapted, folder)
        _check_base(folder, base)
        set_peft_model_state_dict(adapted, saved)
    except BaseException:
        _take_off_(model, trainable)
        raise
    return adapted if is_trainable else adapted.eval()


def _check_base(folder: str | Path, base: str) -> None:
    trained_on = model_of(folder)
    if trained_on is None:
        warn(
            f"{folder} does not say which model its adapter was trained on; only the shapes of its tensors could be "
            "compared."
        )
    elif trained_on != base:
        raise StructPruneError(
            f"The adapter in {folder} was trained on the model {trained_on[:DIGITS]}…, and this is {base[:DIGITS]}…: "
            "the widths are the same, and the weights are not. Load the pruned model that the adapter was trained on."
        )


def check_adapter(adapted: PeftModel, folder: str | Path) -> dict[str, Tensor]:
    """The tensors of a saved adapter by name, which have to have the shapes of the one on a model."""
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
