"""The only file that creates or changes parameters."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from .arch.load import block_list, put_block_
from .arch.spec import ArchSpec, Axis, Space
from .errors import StructPruneError
from .plan import Plan


if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

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
    """A model of the same class with `config`, parameters on the meta device, buffers real."""
    with init_empty_weights(include_buffers=False):
        return type(model)(config)


def slice_tensors(tensors: Mapping[str, Tensor], spaces: Collection[Space], plan: Plan) -> dict[str, Tensor]:
    """Cut tensors down to the units that the plan keeps.

    Args:
        tensors: By full name; those that no space touches come back as they are.
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
        sliced[param] = _pick(sliced[param], dim, indices)
    return sliced


def _pick(tensor: Tensor, dim: int, indices: Sequence[int]) -> Tensor:
    return tensor.index_select(dim, torch.tensor(indices, device=tensor.device))


@torch.no_grad()
def shrink_block_(model: PreTrainedModel, spec: ArchSpec, layer: int, plan: Plan, smaller: PreTrainedModel) -> None:
    """Replace one block by its smaller self.

    The strict load proves that no coupled tensor was forgotten.

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
    try:
        new.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        raise StructPruneError(
            f"The description of {spec.model_type!r} does not fit this model: {' '.join(str(error).split())}"
        ) from error
    _take_over(old, new)
    put_block_(model, spec, layer, new)


def _take_over(old: nn.Module, new: nn.Module) -> None:
    """Buffers that no state dict holds, training mode, requires_grad and hooks.

    Transformers marks a model as hooked once it has been asked for hidden states, and never looks again; without their
    hooks, the new blocks would be left out of these from then on.
    """
    new.train(old.training)
    frozen = {name for name, parameter in old.named_parameters() if not parameter.requires_grad}
    for name, parameter in new.named_parameters():
        parameter.requires_grad = name not in frozen
    saved = set(old.state_dict())
    for name, buffer in old.named_buffers():
        if name not in saved:
            owner, _, leaf = name.rpartition(".")
            new.get_submodule(owner).register_buffer(leaf, buffer, persistent=False)
    for name, module in old.named_modules():
        for kind in FORWARD_HOOKS:
            getattr(new.get_submodule(name), kind).update(getattr(module, kind))


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
