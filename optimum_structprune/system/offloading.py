"""Read and replace weights that accelerate has offloaded to CPU memory or to the disk."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, SequentialHook
from accelerate.utils import OffloadedWeightsLoader, PrefixedDataset, named_module_tensors, set_module_tensor_to_device
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from .errors import StructPruneError, one_line, some_of


def places(model: nn.Module) -> dict[str, str]:
    """Return the `device_map` of a model: the device of each module, or "disk" for offloaded modules.

    It names the largest modules whose tensors are all in one place. accelerate moves inputs to the device of every
    module in the map, so a map of leaf modules would separate tensors that a layer uses together.
    """
    device_map: dict[str, str] = {}

    def walk(name: str, module: nn.Module) -> None:
        module_places: set[str] = set()
        for submodule in module.modules():
            module_places.update(_own_places(submodule).values())
        if not module_places:
            return
        if name and len(module_places) == 1:
            device_map[name] = module_places.pop()
            return

        for leaf, place in _own_places(module).items():
            device_map[_joined(name, leaf)] = place
        for child_name, child in module.named_children():
            walk(_joined(name, child_name), child)

    walk("", model)
    return device_map


def _joined(module_name: str, name: str) -> str:
    """Return the full name of a part of a module. The name of the whole model is empty."""
    if not module_name:
        return name
    return f"{module_name}.{name}"


def _own_places(module: nn.Module) -> dict[str, str]:
    """Return the place of each tensor that a module holds itself."""
    is_offloaded = any(hook.offload for hook in placing_hooks(module))

    own_places = {}
    for name, tensor in named_module_tensors(module):
        own_places[name] = str(tensor.device)
        if is_offloaded:
            own_places[name] = "disk"
    return own_places


@contextmanager
def declared(model: nn.Module) -> Iterator[None]:
    """Set the `hf_device_map` of an offloaded model inside `with`, as transformers reads it."""
    original_map: Any = getattr(model, "hf_device_map", None)
    if original_map is not None and not {"cpu", "disk"}.isdisjoint(original_map.values()):
        yield
        return

    model.hf_device_map = places(model)  # type: ignore[assignment]  # typed as Tensor | Module
    try:
        yield
    finally:
        del model.hf_device_map
        if original_map is not None:
            model.hf_device_map = original_map


def compute_device(model: nn.Module) -> torch.device:
    """Return the device of a model's first weights. For offloaded weights, it is the execution device."""
    for module in model.modules():
        for hook in placing_hooks(module):
            if hook.offload and hook.execution_device is not None:
                return torch.device(hook.execution_device)
        parameter = next(module.parameters(recurse=False), None)
        if parameter is not None:
            return parameter.device
    return torch.device("cpu")


def check_reachable(model: nn.Module) -> None:
    """Raise `StructPruneError` if weights of a model are neither in memory nor offloaded."""
    offloaded = set()
    for name, module, hook in _offloading(model):
        for leaf, _ in named_module_tensors(module, recurse=hook.place_submodules):
            offloaded.add(_joined(name, leaf))

    missing = [name for name, tensor in model.named_parameters() if tensor.is_meta and name not in offloaded]
    if missing:
        count = f"{len(missing)} parameters of this {type(model).__name__}"
        raise StructPruneError(f"{count} have no weights: {some_of(missing)}. Load the model with from_pretrained.")


def weight_of(model: nn.Module, name: str) -> Tensor:
    """Return a parameter or buffer of a model. An offloaded tensor is read from the store of accelerate."""
    path, _, leaf = name.rpartition(".")
    tensor = getattr(model.get_submodule(path), leaf)
    if not tensor.is_meta:
        return tensor

    # The hook is on the tensor's module, or on a module around it.
    parts = path.split(".")
    for length in range(len(parts), -1, -1):
        owner = ".".join(parts[:length])
        for hook in placing_hooks(model.get_submodule(owner)):
            if hook.offload:
                return hook.weights_map[name.removeprefix(f"{owner}.")]
    raise StructPruneError(f"{name} is on the meta device and has no values.")


def placing_hooks(module: nn.Module) -> list[AlignDevicesHook]:
    """Return the hooks of accelerate that place a module."""
    hook = getattr(module, "_hf_hook", None)
    hooks = [hook]
    if isinstance(hook, SequentialHook):
        hooks = hook.hooks
    return [hook for hook in hooks if isinstance(hook, AlignDevicesHook)]


def _offloading(model: nn.Module) -> Iterator[tuple[str, nn.Module, AlignDevicesHook]]:
    """Yield the modules with offloaded weights: their names, the modules, and the hooks that load the weights."""
    for name, module in model.named_modules():
        for hook in placing_hooks(module):
            if hook.offload:
                yield name, module, hook


def _unprefixed(weights: Any, name: str = "") -> tuple[Any, str]:
    """Return the innermost store of offloaded weights, and the full name of a weight in it."""
    while isinstance(weights, PrefixedDataset):
        name = f"{weights.prefix}{name}"
        weights = weights.dataset
    return weights, name


def _tensors_of(module: nn.Module, hook: AlignDevicesHook) -> dict[str, Tensor]:
    """Return the tensors of a module that its hook offloads, by name."""
    tensors = named_module_tensors(
        module, include_buffers=hook.offload_buffers, recurse=hook.place_submodules, remove_non_persistent=True
    )
    return dict(tensors)


def _read(weights: Any, name: str) -> Tensor:
    try:
        return weights[name]
    except (OSError, SafetensorError, ValueError) as error:
        _, name = _unprefixed(weights, name)
        raise StructPruneError(f"The offloaded {name} cannot be read ({one_line(error)}).") from error


def bring_in(layer: nn.Module) -> list[AlignDevicesHook]:
    """Load the offloaded weights of a layer into memory until `put_back`. Return the hooks of the layer."""
    offloading = [(module, hook) for _, module, hook in _offloading(layer)]

    # All weights are read before the first is set, so that an error does not change the layer.
    fetched = []
    for module, hook in offloading:
        for name in _tensors_of(module, hook):
            stored = _read(hook.weights_map, name)
            # On the CPU the layer gets a copy, because the layer may change and the stored weights must not. A tensor
            # that accelerate has read from the disk to another device is a copy already, and may be large.
            weight = stored.to(hook.execution_device, copy=stored.device.type == "cpu")
            fetched.append((module, name, weight))

    for module, name, value in fetched:
        set_module_tensor_to_device(module, name, value.device, value=value)
    for _, hook in offloading:
        hook.offload = False
    return [hook for _, hook in offloading]


def put_back(model: nn.Module, layer: nn.Module, hooks: list[AlignDevicesHook], store: bool) -> None:
    """Offload a layer again. With `store`, its current weights replace the stored weights."""
    on_disk: dict[str, Tensor] = {}
    loaders: dict[str, OffloadedWeightsLoader] = {}
    for module in layer.modules():
        for hook in placing_hooks(module):
            if hook not in hooks:
                continue
            for name, tensor in _tensors_of(module, hook).items():
                if store:
                    loaders.update(_store(hook.weights_map, name, tensor.detach().cpu(), on_disk))
                set_module_tensor_to_device(module, name, "meta")
            hook.offload = True

    if on_disk:
        path = str(_next_file(model))
        save_file(on_disk, path)
        for key, loader in loaders.items():
            dtype = str(on_disk[key].dtype).removeprefix("torch.")
            loader.index[key] = {"safetensors_file": path, "weight_name": key, "dtype": dtype}


def _store(weights: Any, name: str, tensor: Tensor, on_disk: dict[str, Tensor]) -> dict[str, OffloadedWeightsLoader]:
    """Replace a stored tensor.

    A tensor in a file is added to `on_disk` instead, to be written later. Its loader is returned by name.
    """
    weights, name = _unprefixed(weights, name)
    if not isinstance(weights, OffloadedWeightsLoader):
        weights[name] = tensor
        return {}

    if name not in weights.all_keys:
        weights.all_keys.append(name)
    if name in weights.state_dict or not weights.index:
        weights.state_dict[name] = tensor
        return {}

    on_disk[name] = tensor.contiguous()
    return {name: weights}


def _next_file(model: Any) -> Path:
    """Return the path of a new file, in a folder that is deleted with the model."""
    folder = getattr(model, "_structprune_folder", None)
    if folder is None:
        folder = tempfile.mkdtemp(prefix="structprune-", dir=_offload_folder(model))
        model._structprune_folder = folder
        weakref.finalize(model, shutil.rmtree, folder, ignore_errors=True)
    return Path(folder) / f"{len(list(Path(folder).iterdir()))}.safetensors"


def _offload_folder(model: Any) -> str | None:
    """Return the folder that accelerate offloads the weights of a model to, if it exists."""
    for _, _, hook in _offloading(model):
        weights, _ = _unprefixed(hook.weights_map)
        folder = getattr(weights, "save_folder", None)
        if folder is not None and Path(folder).is_dir():
            return folder
    return None
