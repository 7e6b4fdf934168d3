"""Reads and replaces weights that accelerate has offloaded to the CPU's memory or the disk."""

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

from ..errors import StructPruneError, one_line, some_of


def places(model: nn.Module) -> dict[str, str]:
    """Return the `device_map` of a model: the device of each module, or "disk" for offloaded modules.

    It names the topmost modules whose tensors are in one place. accelerate moves inputs to the device of every module
    that a map names, and tensors that modules inside a layer share must not be apart.
    """
    place_of: dict[str, str] = {}
    for name, module in model.named_modules():
        tensors = [tensor for _, tensor in named_module_tensors(module)]
        if not tensors:
            continue
        is_offloaded = any(hook.offload for hook in _hooks_of(module))
        place_of[name] = "disk" if is_offloaded else str(tensors[0].device)

    topmost: dict[str, str] = {}
    for name, _ in model.named_modules():
        if any(name.startswith(f"{above}.") for above in topmost):
            continue
        inside = {place for path, place in place_of.items() if path == name or path.startswith(f"{name}.")}
        if name and len(inside) == 1:
            topmost[name] = inside.pop()
    return topmost


@contextmanager
def declared(model: nn.Module) -> Iterator[None]:
    """Set the `hf_device_map` of an offloaded model inside `with`, as transformers reads it."""
    former: Any = getattr(model, "hf_device_map", None)
    if {"cpu", "disk"} & set((former or {}).values()):
        yield
        return
    model.hf_device_map = places(model)  # type: ignore[assignment]  # typed as Tensor | Module
    try:
        yield
    finally:
        del model.hf_device_map
        if former is not None:
            model.hf_device_map = former


def compute_device(model: nn.Module) -> torch.device:
    """Find the device of the first weights of a model, or the one that accelerate brings them to."""
    for module in model.modules():
        for hook in _hooks_of(module):
            if hook.offload and hook.execution_device is not None:
                return torch.device(hook.execution_device)
        if (tensor := next(module.parameters(recurse=False), None)) is not None:
            return tensor.device
    return torch.device("cpu")


def check_reachable(model: nn.Module) -> None:
    """Refuse a model without weights."""
    held = {
        f"{name}.{leaf}" if name else leaf
        for name, module, hook in _offloading(model)
        for leaf, _ in named_module_tensors(module, recurse=hook.place_submodules)
    }
    if missing := [name for name, tensor in model.named_parameters() if tensor.is_meta and name not in held]:
        count = f"{len(missing)} parameters of this {type(model).__name__}"
        raise StructPruneError(f"{count} have no weights: {some_of(missing)}. Load the model with from_pretrained.")


def weight_of(model: nn.Module, name: str) -> Tensor:
    """Read a parameter or buffer of a model; an offloaded one is read from where accelerate keeps it."""
    path, _, leaf = name.rpartition(".")
    tensor = getattr(model.get_submodule(path), leaf)
    if not tensor.is_meta:
        return tensor
    parts = path.split(".")
    for length in range(len(parts), -1, -1):
        owner = ".".join(parts[:length])
        for hook in _hooks_of(model.get_submodule(owner)):
            if hook.offload:
                return hook.weights_map[name.removeprefix(f"{owner}.") if owner else name]
    raise StructPruneError(f"{name} is on the meta device and has no values.")


def _hooks_of(module: nn.Module) -> list[AlignDevicesHook]:
    hook = getattr(module, "_hf_hook", None)
    hooks = hook.hooks if isinstance(hook, SequentialHook) else [hook]
    return [hook for hook in hooks if isinstance(hook, AlignDevicesHook)]


def _offloading(model: nn.Module) -> Iterator[tuple[str, nn.Module, AlignDevicesHook]]:
    """Iterate over the modules with offloaded weights, by their names and with the hooks that load these."""
    for name, module in model.named_modules():
        yield from ((name, module, hook) for hook in _hooks_of(module) if hook.offload)


def _unprefixed(weights: Any, name: str = "") -> tuple[Any, str]:
    """Find what holds some weights, and the whole name of one of them there."""
    while isinstance(weights, PrefixedDataset):
        weights, name = weights.dataset, f"{weights.prefix}{name}"
    return weights, name


def _tensors_of(module: nn.Module, hook: AlignDevicesHook) -> dict[str, Tensor]:
    """Name the tensors of a module that its hook offloads."""
    return dict(
        named_module_tensors(
            module, include_buffers=hook.offload_buffers, recurse=hook.place_submodules, remove_non_persistent=True
        )
    )


def _read(weights: Any, name: str) -> Tensor:
    try:
        return weights[name]
    except (OSError, SafetensorError, ValueError) as error:
        _, name = _unprefixed(weights, name)
        raise StructPruneError(f"The offloaded {name} cannot be read ({one_line(error)}).") from error


def bring_in(layer: nn.Module) -> list[AlignDevicesHook]:
    """Load the offloaded weights of a layer, and return their hooks, which then keep them in memory."""
    offloading = [(module, hook) for _, module, hook in _offloading(layer)]
    # Copies, on the CPU too: a layer may be changed in place, and the stored weights must not be. What accelerate has
    # read from the disk onto another device is a copy, and of a large tensor there must not be two.
    fetched = [
        (module, name, held.to(hook.execution_device, copy=held.device.type == "cpu"))
        for module, hook in offloading
        for name in _tensors_of(module, hook)
        for held in [_read(hook.weights_map, name)]
    ]
    for module, name, value in fetched:
        set_module_tensor_to_device(module, name, value.device, value=value)
    for _, hook in offloading:
        hook.offload = False
    return [hook for _, hook in offloading]


def put_back(model: nn.Module, layer: nn.Module, hooks: list[AlignDevicesHook], store: bool) -> None:
    """Offload a layer again; `store` replaces what is kept of it."""
    on_disk: dict[str, Tensor] = {}
    index: dict[str, Any] = {}
    for module in layer.modules():
        for hook in filter(hooks.__contains__, _hooks_of(module)):
            for name, tensor in _tensors_of(module, hook).items():
                if store:
                    index |= _store(hook.weights_map, name, tensor.detach().cpu(), on_disk)
                set_module_tensor_to_device(module, name, "meta")
            hook.offload = True
    if on_disk:
        path = str(_next_file(model))
        save_file(on_disk, path)
        for key, loader in index.items():
            entry = {"safetensors_file": path, "weight_name": key, "dtype": str(on_disk[key].dtype)[len("torch.") :]}
            loader.index[key] = entry


def _store(weights: Any, name: str, tensor: Tensor, on_disk: dict[str, Tensor]) -> dict[str, OffloadedWeightsLoader]:
    """Put a tensor in the place of the former one: in memory, or `on_disk`; return the readers of those."""
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
    """Name a new file in a folder that goes when the model does."""
    folder = getattr(model, "_structprune_folder", None)
    if folder is None:
        # Where accelerate offloads to, if that exists.
        held = (_unprefixed(hook.weights_map)[0] for _, _, hook in _offloading(model))
        folders = (getattr(weights, "save_folder", None) for weights in held)
        scratch = next((place for place in folders if place is not None and Path(place).is_dir()), None)
        folder = model._structprune_folder = tempfile.mkdtemp(prefix="structprune-", dir=scratch)
        weakref.finalize(model, shutil.rmtree, folder, ignore_errors=True)
    return Path(folder) / f"{sum(1 for _ in Path(folder).iterdir())}.safetensors"
