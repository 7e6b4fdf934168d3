"""Make a model trainable: with an adapter that fits it, or all of its weights."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel

from ..arch.meta import skeleton
from ..config.fields import build
from ..config.recovery import LORA, RecoveryConfig
from ..system.errors import StructPruneError


# The errors that peft, a training and its files raise for a wrong setting or a damaged file.
LIBRARY_ERRORS: tuple[type[Exception], ...] = (
    ValueError,
    TypeError,
    AttributeError,
    KeyError,
    RuntimeError,
    ImportError,
    ArithmeticError,
    AssertionError,
    re.error,
    OSError,
    SafetensorError,
)


def lora_config(config: RecoveryConfig, model: PreTrainedModel) -> LoraConfig:
    """Return the config of the adapter that a recovery trains: the defaults, overridden by `config.lora`.

    "all-linear" includes the stacked weights of experts, and excludes linear layers that are not called.

    Args:
        config: How the model is trained.
        model: The model.
    """
    settings = dict(LORA)
    settings.update(config.lora)
    adapter: LoraConfig = build(LoraConfig, settings)

    if adapter.target_modules == LORA["target_modules"]:
        experts, routers = _expert_weights(model)
        # peft chooses the experts of some model types itself. Its stacked adapters support neither of these options.
        if adapter.target_parameters is None and not (adapter.lora_dropout or adapter.use_dora):
            adapter.target_parameters = sorted(experts.union(routers)) or None
        if adapter.exclude_modules is None:
            adapter.exclude_modules = _not_called(model, routers) or None
    return adapter


def _expert_weights(model: PreTrainedModel) -> tuple[set[str], set[str]]:
    """Return the stacked weights of experts and the weights of their routers, by their names inside a layer.

    They are found by their shapes, so that models without a description can be trained too.
    """
    experts: set[str] = set()
    routers: set[str] = set()
    for name, module in model.named_modules():
        stacked = [leaf for leaf, weight in module.named_parameters(recurse=False) if weight.ndim == 3]
        if isinstance(module, nn.Conv1d) or not stacked:
            continue

        inside = re.sub(r"^.*?\.\d+\.", "", name)
        experts.update(f"{inside}.{leaf}" for leaf in stacked)

        parent = model.get_submodule(name.rpartition(".")[0])
        for leaf, neighbour in parent.named_children():
            weight = getattr(neighbour, "weight", None)
            is_matrix = isinstance(weight, nn.Parameter) and weight.ndim == 2
            if is_matrix and type(neighbour).forward is not nn.Linear.forward:
                routers.add(f"{inside.rpartition('.')[0]}.{leaf}.weight")
    return experts, routers


def _not_called(model: PreTrainedModel, routers: Collection[str]) -> list[str]:
    """Return modules that an adapter would break: routers, and the linear layers that Mamba's kernels do not call."""
    names: list[str] = []
    endings = tuple(f".{router}" for router in routers)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and f"{name}.weight".endswith(endings):
            names.append(name)
        if hasattr(module, "A_log") and hasattr(module, "D"):
            names += [f"{name}.{part}" for part in ("dt_proj", "out_proj") if hasattr(module, part)]
    return names


@contextmanager
def trainable(model: PreTrainedModel, adapter: PeftConfig | None) -> Iterator[tuple[Any, Callable[[], None]]]:
    """Put a new adapter on a model, or make all its weights trainable, inside `with`.

    Args:
        model: The model.
        adapter: The config of the adapter, or None to train all weights.

    Yields:
        The trained model, and a function that restores the weights of the start. An error inside `with` restores them
        too, and removes the adapter.
    """
    training = model.training
    flags = [(weight, weight.requires_grad) for weight in model.parameters()]

    trained: Any = model
    if adapter is None:
        for weight in model.parameters():
            weight.requires_grad_(weight.is_floating_point())
    else:
        trained = adapted(model, adapter)

    weights = [weight for weight in trained.parameters() if weight.requires_grad]
    start = [weight.detach().to("cpu", copy=True) for weight in weights]

    @torch.no_grad()
    def take_back() -> None:
        for weight, value in zip(weights, start, strict=True):
            weight.copy_(value)

    try:
        yield trained, take_back
    except BaseException:  # Ctrl-C too
        take_back()
        if trained is not model:
            trained.unload()
        raise
    finally:
        model.zero_grad()
        for weight, flag in flags:
            weight.requires_grad_(flag)
        trained.train(training)


def check_fits(model: PreTrainedModel, adapter: LoraConfig) -> None:
    """Raise `StructPruneError` if an adapter cannot be put on a model, by a trial on a model without weights."""
    adapter = deepcopy(adapter)
    adapter.init_lora_weights = True  # other initialisations read the weights
    try:
        empty = skeleton(model, deepcopy(model.config))
    except Exception:
        return  # the constructor of this class needs more than a config, so nothing can be tried

    with torch.device("meta"):
        adapted(empty, adapter)


def adapted(model: PreTrainedModel, adapter: PeftConfig) -> PeftModel:
    """Put a new adapter on a model.

    Raises:
        StructPruneError: If peft cannot place the adapter, or could not merge it afterwards.
    """
    with warnings.catch_warnings():
        # peft warns of tied weights. `_check_tied` refuses the harmful cases.
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings.*")
        # peft warns when it corrects the orientation of a weight.
        warnings.filterwarnings("ignore", message=".*fan_in_fan_out.*")
        # peft warns of unused patterns for the experts of some model types.
        warnings.filterwarnings("ignore", message=".*(rank|alpha)_pattern keys did not match.*")

        try:
            with_adapter: PeftModel = get_peft_model(model, adapter)
        except LIBRARY_ERRORS as error:
            raise StructPruneError(f"peft cannot put the adapter on {type(model).__name__}: {error}") from error

    _check_tied(with_adapter)
    return with_adapter


def _check_tied(model: PeftModel) -> None:
    """Raise if an adapter is on one of several modules that share a weight.

    Merging changes the weight of all these modules, and only one of them was trained. `ensure_weight_tying` of peft
    would merge twice. peft does tie the rows of tokens.
    """
    names_by_weight: dict[int, list[str]] = {}
    for name, weight in model.get_base_model().named_parameters(remove_duplicate=False):
        names_by_weight.setdefault(id(weight), []).append(name)

    for names in names_by_weight.values():
        plain = [re.sub(r"\.(base_layer|original_module)\.", ".", name) for name in names]
        wrapped = []
        for short, full in zip(plain, names, strict=True):
            if short != full and ".token_adapter." not in full:
                wrapped.append(short)

        if len(names) > 1 and wrapped:
            tied = ", ".join(name for name in plain if name != wrapped[0])
            raise StructPruneError(
                f"The adapter would train {wrapped[0]}, which shares its tensor with {tied}, so the merged model "
                "would differ from the trained model. Remove it from `target_modules` and `modules_to_save` in `lora`."
            )
