"""The modules of a model: its lists of layers, and how one module takes the place of another."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from accelerate.hooks import add_hook_to_module, remove_hook_from_module
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import cached_file

from ..errors import StructPruneError, one_line
from ..system.modules import MODULES, modules_root
from .spec import ArchSpec


# The files of sentence-transformers beside its modules: the task of the first one, and the prompts before texts.
TASK = "sentence_bert_config.json"
PROMPTS = "config_sentence_transformers.json"


def layer_list(model: nn.Module, arch: ArchSpec) -> list[nn.Module]:
    """Return the layers of a model, over all lists that hold them."""
    return [layer for path, _ in arch.stacks for layer in model.get_submodule(path).children()]


def blocks(model: nn.Module) -> list[nn.Module]:
    """Return the modules that do most of the work of a model in order: its layers and its head."""
    lists: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        is_inner = any(name.startswith(f"{outer}.") for outer in lists)
        if isinstance(module, nn.ModuleList) and not is_inner:
            lists[name] = module

    modules = [layer for layers in lists.values() for layer in layers]
    output_embeddings = getattr(model, "get_output_embeddings", None)
    if output_embeddings is not None:
        head = output_embeddings()
        if head is not None:
            modules.append(head)
    return modules


def replace_(model: nn.Module, path: str, new: nn.Module, state: Mapping[str, Tensor], arch: ArchSpec) -> None:
    """Replace a module, and move the settings and hooks of the old module to the new one.

    Args:
        model: The model, which is unchanged if `state` does not fit.
        path: The name of the module in the model.
        new: The new module, without weights.
        state: The state dict of the new module.
        arch: The description of the model, which the error names.

    Raises:
        StructPruneError: If `state` does not fit the new module.
    """
    old = model.get_submodule(path)
    # The strict load proves that no coupled tensor was forgotten.
    try:
        new.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        raise StructPruneError(
            f"The description of {arch.model_type!r} does not fit this model: {one_line(error)}"
        ) from error

    # The new module is put in first, so that the model has all weights of one of them if an error follows.
    new.train(old.training)
    model.set_submodule(path, new)
    _move_tensors(old, new)

    new_modules = dict(new.named_modules())
    for name, module in old.named_modules():
        _move_settings(module, new_modules[name])


def _move_tensors(old: nn.Module, new: nn.Module) -> None:
    """Move the parameter objects, and the buffers that are not in the state dict."""
    for name, parameter in old.named_parameters():
        owner, _, leaf = name.rpartition(".")
        data = new.get_parameter(name).data
        device = parameter.device
        # The old data is released first. Where the new data is in CPU memory, the device never holds both.
        parameter.data = data.new_empty(0, device=device)
        parameter.grad = None
        parameter.data = data.to(device)
        setattr(new.get_submodule(owner), leaf, parameter)

    saved = set(old.state_dict())
    for name, buffer in old.named_buffers():
        if name not in saved:
            owner, _, leaf = name.rpartition(".")
            new.get_submodule(owner).register_buffer(leaf, buffer, persistent=False)


def _move_settings(old: nn.Module, new: nn.Module) -> None:
    """Move activation checkpointing, the hooks, and the hook with which accelerate moves inputs between devices.

    transformers installs the hooks that record hidden states once, and never again. Without them, the new layers would
    be missing in the hidden states.
    """
    for key in ("gradient_checkpointing", "_gradient_checkpointing_func"):
        if key in vars(old):
            setattr(new, key, vars(old)[key])

    for key, hooks in vars(old).items():
        if key.startswith(("_forward_hooks", "_forward_pre_hooks")):
            getattr(new, key).update(hooks)

    dispatch: Any = getattr(old, "_hf_hook", None)
    if dispatch is not None:
        remove_hook_from_module(old)
        # The method that accelerate leaves here keeps the weights in memory until the next garbage collection.
        vars(old).pop("forward", None)
        add_hook_to_module(new, dispatch)


def adopt_config_(model: PreTrainedModel, smaller: PreTrainedModel) -> None:
    """Give a pruned model the config of a model of the same shapes.

    Args:
        model: The pruned model, which still has the original config. Its quantized tensors may have other shapes.
        smaller: The model without weights that the new config builds.

    Raises:
        StructPruneError: If a tensor has another shape than in `smaller`.
    """
    new_modules = dict(smaller.named_modules())
    packed = tuple(
        f"{name}." for name, module in model.named_modules() if type(module) is not type(new_modules.get(name))
    )
    expected = _shapes(smaller, packed)
    shapes = _shapes(model, packed)
    for name in sorted(expected.keys() | shapes.keys()):
        if expected.get(name) != shapes.get(name):
            raise StructPruneError(
                f"{name} has shape {shapes.get(name)}, but the shrunk config makes it {expected.get(name)}. "
                f"The description of {smaller.config.model_type!r} is incomplete."
            )

    for name, module in model.named_modules():
        new = new_modules.get(name)
        if new is None:
            continue
        for key, value in vars(new).items():
            if key in vars(module) and _is_from_config(value, module):
                setattr(module, key, value)


def _shapes(model: nn.Module, left_out: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors in a state dict, except under the prefixes in `left_out`."""
    tensors = model.state_dict().items()
    return {name: tuple(tensor.shape) for name, tensor in tensors if not name.startswith(left_out)}


def _is_from_config(value: Any, module: nn.Module) -> bool:
    """Return whether an attribute of a module was made from the config.

    It is a size, a token id, a config, or an object of a class beside the module's own, such as the mapping of
    Chameleon from codes of images to token ids.
    """
    is_local = type(value).__module__ == type(module).__module__
    return type(value) is int or isinstance(value, PretrainedConfig) or is_local


def give_zeros_(model: nn.Module) -> None:
    """Give a model without weights weights of zero on the CPU, which share one number in memory."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            zeros = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
            setattr(module, name, nn.Parameter(zeros, requires_grad=False))


def embedding_of(model: PreTrainedModel) -> Any:
    """Return the embedding of a model's tokens; None if there is no such module.

    The class of a model with two towers does not say which module it is.
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
    own = ""
    if name and Path(name).is_dir():
        root = str(modules_root(Path(name)))
        own = "" if root == name else Path(name).name
    commit = getattr(config, "_commit_hash", None)
    options: dict[str, Any] = {"revision": commit, "_raise_exceptions_for_missing_entries": False}
    with suppress(Exception):  # of the network, of the Hub, or of a file that somebody has changed
        modules = json.loads(Path(str(cached_file(root, MODULES, **options))).read_text("utf-8"))
        folders = [module["path"] for module in modules if module["path"] not in ("", own)]
        files = [(root, MODULES), (name, TASK), (root, PROMPTS)]
        files += [(root, f"{folder}/config.json") for folder in folders]
        texts: dict[str, str] = {}
        for place, file in files:
            path = cached_file(place, file, **options)
            if path:
                texts[file] = Path(path).read_text("utf-8")
        return texts
    return {}
