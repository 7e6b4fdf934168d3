"""The only file that creates or changes parameters."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..arch.load import layer_list, put_layer_, put_layers_
from ..arch.meta import skeleton
from ..arch.shrink import shrunk_config
from ..arch.spec import LAYER, ArchSpec, Space, Widths
from ..errors import StructPruneError
from .plan import Plan


if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

# What transformers sets on modules when activation checkpointing is switched on.
CHECKPOINTING = ("gradient_checkpointing", "_gradient_checkpointing_func")
FORWARD_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


def slice_tensors(tensors: Mapping[str, Tensor], spaces: Collection[Space], plan: Plan) -> dict[str, Tensor]:
    """Cut tensors down to the units that the plan keeps.

    Args:
        tensors: By full name, some or all; those that no space touches come back as they are.
        spaces: The spaces to cut along.
        plan: What is kept.
    """
    cuts: dict[tuple[str, int], list[int]] = defaultdict(list)
    inside: dict[tuple[str, int], dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    for space in spaces:
        if (keep := plan.keep.get((space.layer, space.name))) is not None:
            for axis in space.axes:
                cut = cuts[axis.param, axis.dim] if axis.part is None else inside[axis.param, axis.dim][axis.part]
                cut += axis.indices(keep)
    sliced = dict(tensors)
    for (param, dim), experts in inside.items():
        kept = cuts.pop((param, 0), None) or range(len(tensors[param]))
        cut_matrices = [_pick(tensors[param][expert], dim - 1, experts[expert]) for expert in kept]
        sliced[param] = torch.stack(cut_matrices)
    for (param, dim), indices in cuts.items():
        if param in sliced:
            sliced[param] = _pick(sliced[param], dim, indices)
    return sliced


def _pick(tensor: Tensor, dim: int, indices: Sequence[int]) -> Tensor:
    return tensor.index_select(dim, torch.tensor(indices, device=tensor.device))


@torch.no_grad()
def shrink_layer_(model: PreTrainedModel, arch: ArchSpec, layer: int, plan: Plan, smaller: PreTrainedModel) -> None:
    """Replace one layer by its smaller self, whose parameters are the same objects with less data in them, so that an
    optimizer still holds them.

    Args:
        model: The model that is changed.
        arch: Its description.
        layer: Index of the layer.
        plan: What is kept.
        smaller: `skeleton` of the shrunk config; gives up its layer.

    Raises:
        StructPruneError: If a tensor of the smaller layer does not come out in the shape that its config says.
    """
    prefix = arch.layer_prefix(layer)
    old, new = layer_list(model, arch)[layer], layer_list(smaller, arch)[layer]
    full = {prefix + name: tensor for name, tensor in old.state_dict().items()}
    state = {
        name.removeprefix(prefix): tensor for name, tensor in slice_tensors(full, list(arch.at(layer)), plan).items()
    }
    for name, tensor in new.state_dict().items():
        if name not in state and name.endswith(".bias"):
            weight = state[name.removesuffix("bias") + "weight"]
            state[name] = torch.zeros(tensor.shape, dtype=weight.dtype, device=weight.device)
    replace_(old, new, state, arch)
    put_layer_(model, arch, layer, new)


def replace_(old: nn.Module, new: nn.Module, state: Mapping[str, Tensor], arch: ArchSpec) -> None:
    """Fill a module of a skeleton, and make it take over everything else from the one that it replaces.

    Args:
        old: The module; its parameters move, and take the new values.
        new: Of the `skeleton`.
        state: Every tensor of the new module's state dict.
        arch: Description of the model.

    Raises:
        StructPruneError: If the tensors do not fit.
    """
    _fill(new, state, arch)
    _take_over(old, new)


def _fill(layer: nn.Module, state: Mapping[str, Tensor], arch: ArchSpec) -> None:
    # The strict load proves that no coupled tensor was forgotten.
    try:
        layer.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        raise StructPruneError(
            f"The description of {arch.model_type!r} does not fit this model: {' '.join(str(error).split())}"
        ) from error


def _take_over(old: nn.Module, new: nn.Module) -> None:
    """The parameter objects, buffers that no state dict holds, training mode, activation checkpointing and hooks.

    Transformers marks a model as hooked once it has been asked for hidden states, and never looks again; without their
    hooks, the new layers would be left out of these from then on.
    """
    new.train(old.training)
    for name, parameter in old.named_parameters():
        owner, _, leaf = name.rpartition(".")
        parameter.data, parameter.grad = new.get_parameter(name).data, None
        setattr(new.get_submodule(owner), leaf, parameter)
    saved = set(old.state_dict())
    for name, buffer in old.named_buffers():
        if name not in saved:
            owner, _, leaf = name.rpartition(".")
            new.get_submodule(owner).register_buffer(leaf, buffer, persistent=False)
    modules = dict(new.named_modules())
    for name, module in old.named_modules():
        for key in CHECKPOINTING:
            if key in vars(module):
                setattr(modules[name], key, vars(module)[key])
        for kind in FORWARD_HOOKS:
            getattr(modules[name], kind).update(getattr(module, kind))


def adopt_config_(model: PreTrainedModel, config: PretrainedConfig, smaller: PreTrainedModel) -> None:
    """Make `config` the model's own, and hold every tensor against the model that it describes.

    Raises:
        StructPruneError: If a tensor does not have the shape that the config says.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in smaller.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name in sorted({*expected, *found}):
        if expected.get(name) != found.get(name):
            raise StructPruneError(
                f"{name} has shape {found.get(name)}, but the shrunk config makes it {expected.get(name)}; "
                f"the description of {config.model_type!r} is incomplete."
            )
    # Some models give a part of theirs a config of its own: a copy, or the text half of a multimodal one.
    twins = dict(smaller.named_modules())
    for name, module in model.named_modules():
        if hasattr(module, "config") and hasattr(twins[name], "config"):
            setattr(module, "config", twins[name].config)  # noqa: B010  # a plain assignment is typed as Tensor | Module


@torch.no_grad()
def drop_layers_(model: PreTrainedModel, arch: ArchSpec, keep: Sequence[int]) -> None:
    """Take whole layers out, and build those that stay anew, with the numbers that the shorter config gives them.

    Args:
        model: The model that is changed.
        arch: Its description.
        keep: Layers that stay, ascending.

    Raises:
        StructPruneError: If the config class refuses the depth, or makes other layers of it than those that stay.
    """
    config = shrunk_config(model.config, arch, {LAYER: len(keep)}, stay=keep)
    shorter = skeleton(model, config)
    old, new = layer_list(model, arch), layer_list(shorter, arch)
    for index, layer in zip(keep, new, strict=True):
        replace_(old[index], layer, old[index].state_dict(), arch)
    put_layers_(model, arch, new)
    adopt_config_(model, config, shorter)


def shrink_(model: PreTrainedModel, arch: ArchSpec, plan: Plan, widths: Widths, biased: tuple[str, ...] = ()) -> None:
    """Shrink a model whose removed units have been silenced.

    Args:
        model: The model that is changed.
        arch: Its description.
        plan: What is kept.
        widths: The same in numbers.
        biased: Spaces whose consumers get a bias.
    """
    config = shrunk_config(model.config, arch, widths, biased)
    smaller = skeleton(model, config)
    for layer in range(arch.num_layers):
        shrink_layer_(model, arch, layer, plan, smaller)
    adopt_config_(model, config, smaller)
