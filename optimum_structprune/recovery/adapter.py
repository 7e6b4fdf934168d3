"""Puts on a model what is trained: an adapter that fits it, or all of its weights."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
)
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from ..arch.meta import skeleton
from ..config.fields import build
from ..config.recovery import LORA, RecoveryConfig
from ..errors import StructPruneError, warn
from ..system.fingerprint import weights_hash
from .resume import model_of


# What peft raises where an adapter does not go with a model, or a field of its config has a wrong type.
PEFT_ERRORS = (ValueError, TypeError, AttributeError, KeyError, RuntimeError, ImportError, AssertionError, re.error)
# What training and files of it raise too, where a setting or a file is wrong.
LIBRARY_ERRORS = (*PEFT_ERRORS, OSError, SafetensorError)


def lora_config(config: RecoveryConfig, model: PreTrainedModel, fewer_tokens: bool = False) -> LoraConfig:
    """Makes the adapter that a recovery trains: `config.lora` laid over the defaults.

    "All linear layers" takes in what a mixture stacks in one parameter, and leaves out what is not called as a linear
    layer. Where tokens have gone, the rows of the others are trained too, as they mean more than before.
    """
    kind: LoraConfig = build(LoraConfig, {**LORA, **config.lora})
    if fewer_tokens and kind.trainable_token_indices is None and not kind.modules_to_save:
        table: Any = model.get_input_embeddings()
        head = model.get_output_embeddings()
        # A tied head peft trains with the embedding, and of one with a bias it would lose that.
        apart = isinstance(head, nn.Linear) and head.weight is not table.weight and head.bias is None
        names = [name for name, each in model.named_modules() if each is table or (apart and each is head)]
        kind.trainable_token_indices = {name: [*range(len(table.weight))] for name in names}
    if kind.target_modules == LORA["target_modules"]:
        experts, routers = _of_experts(model)
        # peft knows the experts of some types of model by itself; its stacked adapters take neither of these options.
        if kind.target_parameters is None and not (kind.lora_dropout or kind.use_dora):
            kind.target_parameters = sorted(experts | routers) or None
        if kind.exclude_modules is None:
            kind.exclude_modules = _not_called(model, routers) or None
    return kind


def _of_experts(model: PreTrainedModel) -> tuple[set[str], set[str]]:
    """Finds the stacked matrices of experts, and those of the routers beside them that are no plain linear layers.

    Both by their names inside a layer. Shapes tell them: models that no family describes are trained as well.
    """
    experts, routers = set[str](), set[str]()
    for name, module in model.named_modules():
        stacked = [leaf for leaf, each in module.named_parameters(recurse=False) if each.ndim == 3]
        if isinstance(module, nn.Conv1d) or not stacked:
            continue
        inside = re.sub(r"^.*?\.\d+\.", "", name)
        experts |= {f"{inside}.{leaf}" for leaf in stacked}
        for leaf, beside in model.get_submodule(name.rpartition(".")[0]).named_children():
            weight = getattr(beside, "weight", None)
            if isinstance(weight, nn.Parameter) and weight.ndim == 2 and type(beside).forward is not nn.Linear.forward:
                routers.add(f"{inside.rpartition('.')[0]}.{leaf}.weight")
    return experts, routers


def _not_called(model: PreTrainedModel, routers: Collection[str]) -> list[str]:
    """Finds the linear layers that an adapter would break: routers, and those that Mamba's kernels do not call."""
    names, ends = list[str](), tuple(f".{router}" for router in routers)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and f"{name}.weight".endswith(ends):
            names.append(name)
        if hasattr(module, "A_log") and hasattr(module, "D"):
            names += [f"{name}.{part}" for part in ("dt_proj", "out_proj") if hasattr(module, part)]
    return names


@contextmanager
def trainable(
    model: PreTrainedModel, kind: PeftConfig | None, merge: bool = True
) -> Iterator[tuple[Any, Callable[[], None]]]:
    """Put a new adapter on a model, or without one make all its weights trainable, for a training inside `with`.

    It yields what is trained, and a function that gives it the values of the start, with which a new adapter changes
    nothing. An error inside `with` does that, and takes the adapter off.
    """
    training, flags = model.training, [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    trained: Any = model if kind is None else adapted(model, kind, merge)
    if kind is None:
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
    learnt = [parameter for parameter in trained.parameters() if parameter.requires_grad]
    start = [parameter.detach().to("cpu", copy=True) for parameter in learnt]

    @torch.no_grad()
    def take_back() -> None:
        for parameter, value in zip(learnt, start, strict=True):
            parameter.copy_(value)

    try:
        yield trained, take_back
    except BaseException:  # Ctrl-C too
        take_back()
        merge = True
        if trained is not model:
            trained.unload()
        raise
    finally:
        model.zero_grad()
        for parameter, flag in flags if merge else ():
            parameter.requires_grad_(flag)
        trained.train(training)


def check_fits(model: PreTrainedModel, kind: PeftConfig, merge: bool = True) -> None:
    """Refuse an adapter that cannot be put on a model of the same kind without weights."""
    kind = deepcopy(kind)
    if isinstance(kind, LoraConfig):
        kind.init_lora_weights = True  # others look at the weights
    try:
        empty = skeleton(model, deepcopy(model.config))
    except Exception:
        return  # a model class of an unusual constructor says nothing about the adapter
    with torch.device("meta"):
        adapted(empty, kind, merge)


def adapted(model: PreTrainedModel, kind: PeftConfig, merge: bool = True) -> PeftModel:
    """Put a new adapter on a model; one that could not be merged afterwards is refused."""
    with warnings.catch_warnings():
        # peft warns of tied weights; where that matters, `_check_tied` refuses.
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings.*")
        # It looks up by itself how a module stores its weight, and says so.
        warnings.filterwarnings("ignore", message=".*fan_in_fan_out.*")
        # It has patterns of its own for the experts that it knows, some of which it then does not use.
        warnings.filterwarnings("ignore", message=".*(rank|alpha)_pattern keys did not match.*")
        try:
            with_adapter: PeftModel = get_peft_model(model, kind)
        except PEFT_ERRORS as error:
            raise StructPruneError(f"peft cannot put the adapter on {type(model).__name__}: {error}") from error
    if merge:
        _check_tied(with_adapter)
    return with_adapter


def _check_tied(model: PeftModel) -> None:
    # What peft merges into a tied weight changes it in all of its places, and was trained in one of them. Its
    # `ensure_weight_tying` trains in both and merges both, one on top of the other. Rows of tokens it does tie.
    names: dict[int, list[str]] = {}
    for name, parameter in model.get_base_model().named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for shared in names.values():
        plain = [re.sub(r"\.(base_layer|original_module)\.", ".", name) for name in shared]
        pairs = zip(plain, shared, strict=True)
        wrapped = [name for name, full in pairs if name != full and ".token_adapter." not in full]
        if len(shared) > 1 and wrapped:
            others = ", ".join(name for name in plain if name != wrapped[0])
            raise StructPruneError(
                f"The adapter would train {wrapped[0]}, which is one tensor with {others}, so that the merged model "
                "would not be the one that was trained; leave it out of lora['target_modules'] and "
                "lora['modules_to_save'], or keep the adapter with merge=False."
            )


def name_base_(model: PeftModel, name: str) -> None:
    """Make an adapter and its card say that they belong to the model of this name; an empty one is none."""
    base: Any = model.get_base_model()
    base.name_or_path = base.config._name_or_path = name
    for kind in model.peft_config.values():
        kind.base_model_name_or_path = name


def load_adapter(model: PreTrainedModel, folder: str | Path, is_trainable: bool = False) -> PeftModel:
    """Put a saved adapter on the pruned model that it was trained on.

    As with `PeftModel.from_pretrained`, the weights of the model are frozen afterwards.

    Args:
        model: The pruned model.
        folder: The folder of the adapter that a recovery with `merge=False` saved.
        is_trainable: Whether the adapter can be trained on; otherwise it is frozen too, and the model is in eval mode.

    Raises:
        StructPruneError: If the folder holds no adapter, or the adapter was trained on another model. The message
            names both by their hashes.
    """
    trained_on, base = model_of(folder), weights_hash(model)
    if trained_on is None:
        warn(
            f"{folder} does not say which model its adapter was trained on; only the shapes of its tensors could be "
            "compared."
        )
    elif trained_on != base:
        raise StructPruneError(
            f"The adapter in {folder} was trained on the model {trained_on[:12]}…, and this is {base[:12]}…: "
            "their weights are not the same. Load the pruned model that the adapter was trained on."
        )
    try:
        Path(folder, SAFETENSORS_WEIGHTS_NAME).stat()  # without it, peft reads a file that can hold code
        return PeftModel.from_pretrained(model, str(folder), is_trainable=is_trainable)
    except LIBRARY_ERRORS as error:
        raise StructPruneError(f"{folder} holds no adapter for this model: {error}") from error


def check_adapter(model: PeftModel, folder: str | Path) -> None:
    """Refuse a saved adapter that is not the one on a model."""
    saved = load_file(Path(folder, SAFETENSORS_WEIGHTS_NAME))
    expected = {name: tensor.cpu() for name, tensor in get_peft_model_state_dict(model).items()}
    if {*saved} != {*expected} or not all(torch.equal(tensor, expected[name]) for name, tensor in saved.items()):
        raise StructPruneError(f"The adapter that was written to {folder} does not come back the same.")
