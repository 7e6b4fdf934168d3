"""Cuts parameters down to the kept units, and puts the smaller modules into the model."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from accelerate.hooks import add_hook_to_module, remove_hook_from_module
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PretrainedConfig, PreTrainedModel

from ..arch.load import layer_list, put_layer_, put_layers_
from ..arch.meta import skeleton
from ..arch.shrink import shrunk_config
from ..arch.spec import LAYER, ArchSpec, Space, Widths
from ..errors import StructPruneError, one_line
from .plan import Plan


# What transformers sets on modules when activation checkpointing is switched on.
CHECKPOINTING = ("gradient_checkpointing", "_gradient_checkpointing_func")
FORWARD_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


class Cut(NamedTuple):
    """Where a parameter is cut: along a dimension, and where `part` is given, only at that index of dimension 0."""

    dim: int
    part: int | None = None


def slice_tensors(tensors: Mapping[str, Tensor], spaces: Collection[Space], plan: Plan) -> dict[str, Tensor]:
    """Cut tensors down to the units that the plan keeps."""
    cuts: dict[str, dict[Cut, list[int]]] = {}
    for space in spaces:
        if (keep := plan.keep.get(space.key)) is not None:
            for axis in space.axes:
                cuts_of_param = cuts.setdefault(axis.param, {})
                cuts_of_param.setdefault(Cut(axis.dim, axis.part), []).extend(axis.indices(keep))
    return {name: _sliced(tensor, cuts.get(name, {})) for name, tensor in tensors.items()}


def _sliced(tensor: Tensor, cuts: Mapping[Cut, Sequence[int]]) -> Tensor:
    """A tensor cut down to the given indices; stacked matrices are cut one by one, and only those that are kept."""
    if any(cut.part is not None for cut in cuts):
        kept = cuts.get(Cut(0), range(len(tensor)))
        by_part: dict[int | None, dict[Cut, Sequence[int]]] = {}
        for cut, indices in cuts.items():
            by_part.setdefault(cut.part, {})[Cut(cut.dim - 1)] = indices
        tensor = torch.stack([_sliced(tensor[part], by_part.get(part, {})) for part in kept])
        cuts = {cut: indices for cut, indices in cuts.items() if cut.part is None and cut.dim}
    for cut, indices in cuts.items():
        tensor = tensor.index_select(cut.dim, torch.tensor(indices, device=tensor.device))
    return tensor


@contextmanager
def rebuilding_(model: PreTrainedModel, config: PretrainedConfig, buffers: bool = False) -> Iterator[PreTrainedModel]:
    """Give a model another config; inside `with`, modules of the skeleton that it gives are put into the model."""
    new = skeleton(model, config, buffers)
    yield new
    adopt_config_(model, new)


@torch.no_grad()
def shrink_layer_(model: PreTrainedModel, arch: ArchSpec, layer: int, plan: Plan, smaller: PreTrainedModel) -> None:
    """Replace one layer by a smaller one, whose parameters are the same objects with less data in them, so that an
    optimizer still holds them.
    """
    prefix = arch.layer_prefix(layer)
    full = {prefix + name: tensor for name, tensor in layer_list(model, arch)[layer].state_dict().items()}
    state = tensors_under(slice_tensors(full, list(arch.at(layer)), plan), prefix)
    for name, tensor in layer_list(smaller, arch)[layer].state_dict().items():
        if name not in state and name.endswith(".bias"):
            weight = state[name.removesuffix("bias") + "weight"]
            state[name] = torch.zeros(tensor.shape, dtype=weight.dtype, device=weight.device)
    _exchange_(model, arch, layer, state, smaller)


def fill_layer_(
    model: PreTrainedModel, arch: ArchSpec, layer: int, state: Mapping[str, Tensor], smaller: PreTrainedModel
) -> None:
    """Replace one layer by a smaller one that an earlier run has made; see `shrink_layer_`."""
    device = next(layer_list(model, arch)[layer].parameters()).device
    _exchange_(model, arch, layer, {name: tensor.to(device) for name, tensor in state.items()}, smaller)


def replace_layers_(
    model: PreTrainedModel, arch: ArchSpec, other: PreTrainedModel, state: Mapping[str, Tensor]
) -> None:
    """Replace all layers of a model by those of a skeleton."""
    for layer in range(arch.num_layers):
        _exchange_(model, arch, layer, tensors_under(state, arch.layer_prefix(layer)), other)


def _exchange_(
    model: PreTrainedModel, arch: ArchSpec, layer: int, state: Mapping[str, Tensor], other: PreTrainedModel
) -> None:
    new = layer_list(other, arch)[layer]
    replace_(layer_list(model, arch)[layer], new, state, arch)
    put_layer_(model, arch, layer, new)


def tensors_under(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with a prefix, by their names without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def replace_(old: nn.Module, new: nn.Module, state: Mapping[str, Tensor], arch: ArchSpec) -> None:
    """Fill a module of a skeleton, and make it take over everything else from the module that it replaces."""
    # The strict load proves that no coupled tensor was forgotten.
    try:
        new.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        raise StructPruneError(
            f"The description of {arch.model_type!r} does not fit this model: {one_line(error)}"
        ) from error
    new.train(old.training)
    _move_tensors(old, new)
    modules = dict(new.named_modules())
    for name, module in old.named_modules():
        _move_settings(module, modules[name])


def _move_tensors(old: nn.Module, new: nn.Module) -> None:
    """Move the parameter objects, and the buffers that no state dict holds."""
    for name, parameter in old.named_parameters():
        owner, _, leaf = name.rpartition(".")
        parameter.data, parameter.grad = new.get_parameter(name).data, None
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
    for key in CHECKPOINTING:
        if key in vars(old):
            setattr(new, key, vars(old)[key])
    for kind in FORWARD_HOOKS:
        getattr(new, kind).update(getattr(old, kind))
    dispatch: Any = getattr(old, "_hf_hook", None)
    if dispatch is not None:
        remove_hook_from_module(old)
        # What accelerate leaves there holds the module, and so its weights until the next garbage collection.
        vars(old).pop("forward", None)
        add_hook_to_module(new, dispatch)


def adopt_config_(model: PreTrainedModel, smaller: PreTrainedModel) -> None:
    """Give a model the config of a skeleton, once every tensor has been compared with those of the skeleton."""
    expected = {name: tuple(tensor.shape) for name, tensor in smaller.state_dict().items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name in sorted({*expected, *shapes}):
        if expected.get(name) != shapes.get(name):
            raise StructPruneError(
                f"{name} has shape {shapes.get(name)}, but the shrunk config makes it {expected.get(name)}; "
                f"the description of {smaller.config.model_type!r} is incomplete."
            )
    # Some models give a part of theirs a config of its own: a copy, or that of the text model of a multimodal one.
    twins = dict(smaller.named_modules())
    for name, module in model.named_modules():
        if hasattr(module, "config") and hasattr(twins[name], "config"):
            setattr(module, "config", twins[name].config)  # noqa: B010  # a plain assignment is typed as Tensor | Module


@torch.no_grad()
def drop_layers_(model: PreTrainedModel, arch: ArchSpec, keep: Sequence[int]) -> None:
    """Remove whole layers, and build those that stay anew, with the indices that the shorter config gives them."""
    config = shrunk_config(model.config, arch, {LAYER: len(keep)}, stay=keep)
    with rebuilding_(model, config) as shorter:
        old, new = layer_list(model, arch), layer_list(shorter, arch)
        for index, layer in zip(keep, new, strict=True):
            replace_(old[index], layer, old[index].state_dict(), arch)
        put_layers_(model, arch, new)


def shrink_(model: PreTrainedModel, arch: ArchSpec, plan: Plan, widths: Widths, biased: tuple[str, ...] = ()) -> None:
    """Shrink a model whose removed units have been masked."""
    with rebuilding_(model, shrunk_config(model.config, arch, widths, biased)) as smaller:
        for layer in range(arch.num_layers):
            shrink_layer_(model, arch, layer, plan, smaller)


@torch.no_grad()
def slice_state_(optimizer: Optimizer, model: nn.Module, arch: ArchSpec, plan: Plan) -> None:
    """Cut an optimizer's state down with its parameters, so that every kept weight keeps its state."""
    states = {name: optimizer.state[p] for name, p in model.named_parameters() if p in optimizer.state}
    for key in {key for state in states.values() for key in state}:
        tensors = {name: state[key] for name, state in states.items() if isinstance(state.get(key), Tensor)}
        for name, tensor in slice_tensors({n: t for n, t in tensors.items() if t.ndim}, arch.spaces, plan).items():
            states[name][key] = tensor


def check_state(optimizer: Optimizer) -> None:
    """Refuse an optimizer whose state does not belong to single weights."""
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, Tensor) and value.ndim and value.shape != parameter.shape:
                raise StructPruneError(
                    f"{type(optimizer).__name__} keeps {key!r} of shape {tuple(value.shape)} for a parameter of shape "
                    f"{tuple(parameter.shape)}, which cannot be cut with it; use optim='adamw_torch'."
                )
