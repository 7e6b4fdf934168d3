"""The only file that creates or changes parameters."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .arch.load import block_list, put_block_
from .arch.shrink import shrunk_config
from .arch.spec import ArchSpec, Axis, Space
from .errors import StructPruneError
from .heterogeneous import heterogeneous
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


def read_consumer(model: nn.Module, axis: Axis) -> tuple[Tensor, Tensor | None]:
    """Weight `(out, n)` and bias `(out,)` of a consumer as fp32 copies, whichever way round it is stored."""
    weight, bias = _consumer(model, axis)
    return weight.to(torch.float32, copy=True), None if bias is None else bias.to(torch.float32, copy=True)


@torch.no_grad()
def write_consumer_(model: nn.Module, axis: Axis, keep: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Give a consumer refitted columns, and zeros where a column is removed: the block then computes what the
    smaller block will compute.

    Args:
        model: The model that is changed.
        axis: The consumer.
        keep: Kept columns.
        weight: Their new values, shape `(out, kept)`.
        bias: New bias, shape `(out,)`; None leaves the module without one.
    """
    columns, old = _consumer(model, axis)
    columns.zero_()
    columns[:, keep] = weight.to(columns)
    if bias is None:
        return
    if old is not None:
        old.copy_(bias)
    else:
        module = model.get_submodule(axis.module)
        trained = module.get_parameter(axis.param.rpartition(".")[2]).requires_grad
        module.bias = nn.Parameter(bias.to(columns), requires_grad=trained)


def _consumer(model: nn.Module, axis: Axis) -> tuple[Tensor, Tensor | None]:
    """Views of a consumer's weight, `(out, n)`, and bias: those of one expert where the axis names one."""
    module, leaf = model.get_submodule(axis.module), axis.param.rpartition(".")[2]
    weight = module.get_parameter(leaf).detach()
    bias = getattr(module, "bias" if axis.part is None else f"{leaf}_bias", None)
    bias = None if bias is None else bias.detach()
    if axis.part is None:
        return weight.movedim(axis.dim, -1), bias
    return weight[axis.part].movedim(axis.dim - 1, -1), None if bias is None else bias[axis.part]


def skeleton(model: PreTrainedModel, config: PretrainedConfig) -> PreTrainedModel:
    """A model of the same class with `config`, on the meta device: shapes without memory."""
    with torch.device("meta"), heterogeneous():
        return type(model)(config)


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
def shrink_block_(model: PreTrainedModel, spec: ArchSpec, layer: int, plan: Plan, smaller: PreTrainedModel) -> None:
    """Replace one block by its smaller self, whose parameters are the same objects with less data in them, so that an
    optimizer still holds them.

    Args:
        model: The model that is changed.
        spec: Its description.
        layer: Index of the block.
        plan: What is kept.
        smaller: `skeleton` of the shrunk config; gives up its block.

    Raises:
        StructPruneError: If a tensor of the smaller block does not come out in the shape that its config says.
    """
    prefix = spec.block_prefix(layer)
    old, new = block_list(model, spec)[layer], block_list(smaller, spec)[layer]
    full = {prefix + name: tensor for name, tensor in old.state_dict().items()}
    state = {
        name.removeprefix(prefix): tensor for name, tensor in slice_tensors(full, list(spec.at(layer)), plan).items()
    }
    for name, tensor in new.state_dict().items():
        if name not in state and name.endswith(".bias"):
            weight = state[name.removesuffix("bias") + "weight"]
            state[name] = torch.zeros(tensor.shape, dtype=weight.dtype, device=weight.device)
    replace_(old, new, state, spec)
    put_block_(model, spec, layer, new)


@torch.no_grad()
def resize_(model: PreTrainedModel, spec: ArchSpec, tensors: Mapping[str, Tensor]) -> None:
    """Give the blocks the widths of a state dict that is about to be loaded; the values are zero until then.

    Args:
        model: The model that is changed.
        spec: Its description.
        tensors: The state dict, or a part of it.

    Raises:
        StructPruneError: If the blocks' widths differ where this architecture takes one for all.
    """
    found: dict[str, dict[int, int]] = {}
    for space in spec.spaces:
        axis = space.out[0]
        if axis.param in tensors:
            here, there = (held.shape[axis.dim] for held in (model.get_parameter(axis.param), tensors[axis.param]))
            found.setdefault(space.kind, {})[space.layer] = space.width * there // here
    sizes: dict[str, int | Mapping[int, int]] = {}
    for name, widths in found.items():
        least, most = min(widths.values()), max(widths.values())
        if least < most and (reason := spec.uniform or spec.of(name)[0].uniform):
            raise StructPruneError(
                f"The state dict has {least} units of {name!r} in one block and {most} in another; a plain "
                f"{spec.model_type} config takes one width for all: {reason}."
            )
        sizes[name] = most if least == most else widths
    if all(space.width_in(sizes) == space.width for space in spec.spaces):
        return
    like = next(model.parameters())
    _rebuild_(model, spec, shrunk_config(model.config, spec, sizes), lambda _, new: like.new_zeros(new.shape))


@torch.no_grad()
def pad_(model: PreTrainedModel, spec: ArchSpec) -> None:
    """Give every block the width of the widest; what is added is zero, and the model computes what it did before.

    Zero columns in the consumers make it exact: whatever the added units give, none of it gets through.

    Args:
        model: The model that is changed.
        spec: Its description.
    """
    widest = {kind: max(space.width for space in spec.of(kind)) for kind in {space.kind for space in spec.spaces}}
    state = model.state_dict()
    places: dict[str, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    for space in spec.spaces:
        size = widest[space.kind] * space.scale
        # The experts of a block grow alike, so the first speaks for all.
        for axis in (axis for axis in space.axes if axis.part in (None, 0)):
            # Packed parts move apart: each begins where those before it end once they have grown.
            moved = replace(axis, offset=axis.offset // space.size * size)
            places[axis.param][axis.dim] += moved.indices(range(space.size))

    def padded(name: str, new: Tensor) -> Tensor:
        tensor = state[name]
        for dim, place in places[name].items():
            shape = (*tensor.shape[:dim], new.shape[dim], *tensor.shape[dim + 1 :])
            index = torch.tensor(place, device=tensor.device)
            tensor = tensor.new_zeros(shape).index_copy_(dim, index, tensor)
        return tensor

    _rebuild_(model, spec, shrunk_config(model.config, spec, widest), padded)


def _rebuild_(
    model: PreTrainedModel, spec: ArchSpec, config: PretrainedConfig, values: Callable[[str, Tensor], Tensor]
) -> None:
    """Put blocks of other sizes in the place of a model's own.

    Args:
        model: The model that is changed.
        spec: Its description.
        config: With the new sizes.
        values: Gives every tensor of the new blocks, from its full name and one of its shape on the meta device.
    """
    resized = skeleton(model, config)
    for layer, (old, new) in enumerate(zip(block_list(model, spec), block_list(resized, spec), strict=True)):
        prefix = spec.block_prefix(layer)
        replace_(old, new, {name: values(prefix + name, tensor) for name, tensor in new.state_dict().items()}, spec)
        put_block_(model, spec, layer, new)
    adopt_config_(model, config, resized)


def replace_(old: nn.Module, new: nn.Module, state: Mapping[str, Tensor], spec: ArchSpec) -> None:
    """Fill a module of a skeleton, and make it take over everything else from the one that it replaces.

    Args:
        old: The module; its parameters move, and take the new values.
        new: Of the `skeleton`.
        state: Every tensor of the new module's state dict.
        spec: Description of the model.

    Raises:
        StructPruneError: If the tensors do not fit.
    """
    _fill(new, state, spec)
    _take_over(old, new)


def _fill(block: nn.Module, state: Mapping[str, Tensor], spec: ArchSpec) -> None:
    # The strict load proves that no coupled tensor was forgotten.
    try:
        block.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        raise StructPruneError(
            f"The description of {spec.model_type!r} does not fit this model: {' '.join(str(error).split())}"
        ) from error


def _take_over(old: nn.Module, new: nn.Module) -> None:
    """The parameter objects, buffers that no state dict holds, training mode, activation checkpointing and hooks.

    Transformers marks a model as hooked once it has been asked for hidden states, and never looks again; without their
    hooks, the new blocks would be left out of these from then on.
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


def units_to_columns(keep: Sequence[int], axis: Axis, device: torch.device) -> Tensor:
    """Kept columns of a consumer, from kept units."""
    return torch.tensor(axis.indices(keep), device=device)
