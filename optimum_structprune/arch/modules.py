"""The modules of a model: its lists of layers, and how one module takes the place of another."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from accelerate.hooks import add_hook_to_module, remove_hook_from_module
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import cached_file

from ..errors import StructPruneError, one_line
from .spec import ArchSpec


# The files of sentence-transformers: its modules, what the first of them is to compute, and the prompts before texts.
MODULES, TASK, PROMPTS = "modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"


def layer_list(model: nn.Module, arch: ArchSpec) -> list[nn.Module]:
    """The layers of a model, over all lists that hold them."""
    return [layer for path, _ in arch.stacks for layer in model.get_submodule(path).children()]


def blocks(model: nn.Module) -> list[nn.Module]:
    """The modules that most of the work of a model is done in, one after the other: its layers, and its head."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    outer = [name for name in names if not any(name.startswith(f"{other}.") for other in names)]
    head = getattr(model, "get_output_embeddings", lambda: None)()
    layers = [layer for name in outer for layer in model.get_submodule(name).children()]
    return layers if head is None else [*layers, head]


def replace_(model: nn.Module, path: str, new: nn.Module, state: Mapping[str, Tensor], arch: ArchSpec) -> None:
    """Replace the module at a path by one without weights, filled with `state`; settings and hooks move over.

    Where `state` does not fit, the model is left as it was.
    """
    old = model.get_submodule(path)
    # The strict load proves that no coupled tensor was forgotten.
    try:
        new.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        raise StructPruneError(
            f"The description of {arch.model_type!r} does not fit this model: {one_line(error)}"
        ) from error
    new.train(old.training)
    model.set_submodule(path, new)  # first, so that the model has all weights of one of them whatever ends the rest
    _move_tensors(old, new)
    modules = dict(new.named_modules())
    for name, module in old.named_modules():
        _move_settings(module, modules[name])


def _move_tensors(old: nn.Module, new: nn.Module) -> None:
    """Move the parameter objects, and the buffers that no state dict holds."""
    for name, parameter in old.named_parameters():
        owner, _, leaf = name.rpartition(".")
        data, device = new.get_parameter(name).data, parameter.device
        # The old data goes first: where the new is in the CPU's memory, the device never has both.
        parameter.data, parameter.grad = data.new_empty(0, device=device), None
        parameter.data = data.to(device)
        setattr(new.get_submodule(owner), leaf, parameter)
    saved = set(old.state_dict())
    for name, buffer in old.named_buffers():
        if name not in saved:
            owner, _, leaf = name.rpartition(".")
            new.get_submodule(owner).register_buffer(leaf, buffer, persistent=False)


def _move_settings(old: nn.Module, new: nn.Module) -> None:
    """Move activation checkpointing, the hooks, and the hook with which accelerate moves inputs between devices.

    Transformers marks a model as hooked once it has been asked for hidden states, and does not look again; without
    their hooks, the new layers would be missing in the hidden states from then on.
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
        # What accelerate leaves there holds the module, and so its weights until the next garbage collection.
        vars(old).pop("forward", None)
        add_hook_to_module(new, dispatch)


def adopt_config_(model: PreTrainedModel, smaller: PreTrainedModel) -> None:
    """Give a model the config of a smaller one without weights, once all shapes agree but of quantized tensors."""
    twins = dict(smaller.named_modules())
    packed = tuple(f"{name}." for name, part in model.named_modules() if type(part) is not type(twins.get(name)))
    expected, shapes = (
        {name: tuple(tensor.shape) for name, tensor in each.state_dict().items() if not name.startswith(packed)}
        for each in (smaller, model)
    )
    for name in sorted({*expected, *shapes}):
        if expected.get(name) != shapes.get(name):
            raise StructPruneError(
                f"{name} has shape {shapes.get(name)}, but the shrunk config makes it {expected.get(name)}; "
                f"the description of {smaller.config.model_type!r} is incomplete."
            )
    # Modules remember sizes and ids, such as that of the padding, and some hold a config of their own: a copy, or that
    # of the text model of a multimodal one.
    for name, module in model.named_modules():
        for key, value in vars(twins.get(name, module)).items():
            if key in vars(module) and (type(value) is int or isinstance(value, PretrainedConfig)):
                setattr(module, key, value)


def embedding_of(model: PreTrainedModel) -> Any:
    """Finds the embedding of a model's tokens, which the class of a model with two towers does not name."""
    with suppress(NotImplementedError):
        return model.get_input_embeddings()
    size = getattr(model.config.get_text_config(), "vocab_size", None)
    return next((part for part in model.modules() if getattr(part, "num_embeddings", 0) == size), None)


def module_files(config: PretrainedConfig) -> dict[str, str]:
    """Reads the configs of sentence-transformers around the model of a config, by their paths; none elsewhere."""
    name, commit = config.name_or_path or "", getattr(config, "_commit_hash", None)
    find = partial(cached_file, name, revision=commit, _raise_exceptions_for_missing_entries=False)
    with suppress(Exception):  # of the network, of the Hub, or of a file that somebody has changed
        paths = [module["path"] for module in json.loads(Path(str(find(MODULES))).read_text("utf-8"))]
        files = (MODULES, TASK, PROMPTS, *(f"{path}/config.json" for path in paths if path))
        return {file: Path(path).read_text("utf-8") for file in files if (path := find(file))}
    return {}
