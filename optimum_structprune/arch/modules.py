"""Find the layers of a model, replace modules, and copy settings to the new modules."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from copy import copy, deepcopy
from pathlib import Path
from typing import Any

import torch
from accelerate.hooks import add_hook_to_module, remove_hook_from_module
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import cached_file

from ..system.errors import StructPruneError, one_line
from ..system.modules import MODULES, modules_root
from ..system.offloading import placing_hooks
from .spec import ArchSpec


# The files of sentence-transformers with the task of the first module, and with the prompts before texts.
TASK = "sentence_bert_config.json"
PROMPTS = "config_sentence_transformers.json"


def layer_list(model: nn.Module, arch: ArchSpec) -> list[nn.Module]:
    """Return the layers of a model, over all lists of layers."""
    layers: list[nn.Module] = []
    for path, _ in arch.stacks:
        layers.extend(model.get_submodule(path).children())
    return layers


def blocks(model: Any) -> list[nn.Module]:
    """Return the modules that do most of the work of a model, in order: its layers and its head."""
    list_names: list[str] = []
    modules: list[nn.Module] = []
    for name, module in model.named_modules():
        is_inner = any(name.startswith(f"{list_name}.") for list_name in list_names)
        if isinstance(module, nn.ModuleList) and not is_inner:
            list_names.append(name)
            modules.extend(module)

    if hasattr(model, "get_output_embeddings"):
        head = model.get_output_embeddings()
        if head is not None:
            modules.append(head)

    return modules


def replace_(model: nn.Module, path: str, new_module: nn.Module, state: Mapping[str, Tensor], arch: ArchSpec) -> None:
    """Replace a module, and move the parameters, settings and hooks of the old module to the new one.

    Args:
        model: The model. It does not change if `state` does not fit.
        path: The name of the module in the model.
        new_module: The new module, without weights.
        state: The state dict of the new module.
        arch: The description of the model, which the error names.

    Raises:
        StructPruneError: If `state` does not fit the new module.
    """
    old_module = model.get_submodule(path)

    # The strict load proves that every coupled tensor was pruned.
    try:
        new_module.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        raise StructPruneError(
            f"The description of {arch.model_type!r} does not fit this model: {one_line(error)}"
        ) from error

    # The new module is inserted first, so that the model has all weights of one of the two if an error follows.
    new_module.train(old_module.training)
    model.set_submodule(path, new_module)
    _move_tensors(old_module, new_module)

    new_modules = dict(new_module.named_modules())
    for name, module in old_module.named_modules():
        _move_settings(module, new_modules[name])


def _move_tensors(old_module: nn.Module, new_module: nn.Module) -> None:
    """Move the parameter objects, and the buffers that are not in the state dict."""
    for name, parameter in old_module.named_parameters():
        owner, _, attribute = name.rpartition(".")
        data = new_module.get_parameter(name).data
        device = parameter.device

        # The old data is released first. If the new data is in CPU memory, the device never holds both.
        parameter.data = data.new_empty(0, device=device)
        parameter.grad = None
        parameter.data = data.to(device)
        setattr(new_module.get_submodule(owner), attribute, parameter)

    saved_names = set(old_module.state_dict())
    for name, buffer in old_module.named_buffers():
        if name not in saved_names:
            owner, _, attribute = name.rpartition(".")
            new_module.get_submodule(owner).register_buffer(attribute, buffer, persistent=False)


def _move_settings(old_module: nn.Module, new_module: nn.Module) -> None:
    """Move activation checkpointing and the hooks, also accelerate's hook that moves inputs between devices.

    transformers installs the hooks that record hidden states only once. Without them, the hidden states of the new
    layers would be missing.
    """
    for key in ("gradient_checkpointing", "_gradient_checkpointing_func"):
        if key in vars(old_module):
            setattr(new_module, key, vars(old_module)[key])

    for key, hooks in vars(old_module).items():
        if key.startswith(("_forward_hooks", "_forward_pre_hooks")):
            getattr(new_module, key).update(hooks)

    dispatch_hook: Any = getattr(old_module, "_hf_hook", None)
    if dispatch_hook is not None:
        hooks = placing_hooks(old_module)
        remove_hook_from_module(old_module)
        # Accelerate leaves a method here that holds the weights in memory until the next garbage collection.
        vars(old_module).pop("forward", None)

        # The hook knows tied weights by their addresses in CPU memory, which other tensors may have by now. It would
        # put a tied weight in the place of such a tensor. The tensors of the new module are on their device already.
        for hook in hooks:
            if not hook.offload:
                hook.tied_params_map = None
        add_hook_to_module(new_module, dispatch_hook)


def adopt_config_(model: PreTrainedModel, smaller: PreTrainedModel) -> None:
    """Set the config of a pruned model, and the module attributes that depend on the config.

    Args:
        model: The pruned model, which still has the original config. Its quantized tensors may have other shapes.
        smaller: The model without weights that the new config builds.

    Raises:
        StructPruneError: If a tensor has another shape than in `smaller`.
    """
    new_modules = dict(smaller.named_modules())
    quantized_prefixes = []
    for name, module in model.named_modules():
        if type(module) is not type(new_modules.get(name)):
            quantized_prefixes.append(f"{name}.")

    expected_shapes = _shapes(smaller, tuple(quantized_prefixes))
    shapes = _shapes(model, tuple(quantized_prefixes))
    for name in sorted(set(expected_shapes).union(shapes)):
        if expected_shapes.get(name) != shapes.get(name):
            raise StructPruneError(
                f"{name} has shape {shapes.get(name)}, but the shrunk config makes it {expected_shapes.get(name)}. "
                f"The description of {smaller.config.model_type!r} is incomplete."
            )

    for name, module in model.named_modules():
        if name not in new_modules:
            continue

        for key, value in vars(new_modules[name]).items():
            if key in vars(module) and _is_from_config(value, module):
                setattr(module, key, value)


def _shapes(model: nn.Module, excluded_prefixes: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors in a state dict, except for names with an excluded prefix."""
    tensors = model.state_dict().items()
    return {name: tuple(tensor.shape) for name, tensor in tensors if not name.startswith(excluded_prefixes)}


def _is_from_config(value: Any, module: nn.Module) -> bool:
    """Return whether an attribute of a module was made from the config.

    Such attributes are sizes, token ids, configs, and objects whose class is defined next to the class of the module.
    Chameleon's mapping from image codes to token ids is such an object.
    """
    is_local = type(value).__module__ == type(module).__module__
    return type(value) is int or isinstance(value, PretrainedConfig) or is_local


def set_zeros_(model: nn.Module) -> None:
    """Set the weights of a model without weights to zero on the CPU. The weights share one number in memory."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            zeros = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
            setattr(module, name, nn.Parameter(zeros, requires_grad=False))


def embedding_of(model: PreTrainedModel) -> Any:
    """Return the token embedding of a model, or None if the model does not have one.

    The class of a model with two towers does not name its embedding, so it is found by its size.
    """
    with suppress(NotImplementedError):
        return model.get_input_embeddings()

    size = getattr(model.config.get_text_config(), "vocab_size", None)
    for module in model.modules():
        if getattr(module, "num_embeddings", 0) == size:
            return module
    return None


def module_files(config: PretrainedConfig) -> dict[str, str]:
    """Return the texts of the files of sentence-transformers around a model, by path; none for other models."""
    name = config.name_or_path or ""
    root = name
    model_folder = ""
    # The files may lie in the parent folder of the model.
    if name and Path(name).is_dir():
        root = str(modules_root(Path(name)))
        if root != name:
            model_folder = Path(name).name

    commit = getattr(config, "_commit_hash", None)
    options: dict[str, Any] = {"revision": commit, "_raise_exceptions_for_missing_entries": False}

    # The network, the Hub, or a file that a user has changed may cause an error.
    with suppress(Exception):
        modules = json.loads(Path(str(cached_file(root, MODULES, **options))).read_text("utf-8"))
        files = [(root, MODULES), (name, TASK), (root, PROMPTS)]
        for module in modules:
            if module["path"] not in ("", model_folder):
                files.append((root, f"{module['path']}/config.json"))

        texts: dict[str, str] = {}
        for folder, file in files:
            path = cached_file(folder, file, **options)
            if path:
                texts[file] = Path(path).read_text("utf-8")
        return texts

    return {}


def copy_with_shared_weights(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy of a model whose parameters share memory with the parameters of the model."""
    return deepcopy(model, {id(parameter): copy(parameter) for parameter in model.parameters()})
