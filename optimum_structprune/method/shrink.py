"""Weights: how consumers are read, written and masked, and how a layer is cut down to the kept units."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..arch.modules import layer_list, replace_
from ..arch.spec import ArchSpec, Axis, Space
from ..errors import StructPruneError
from .devices import free_bytes


# Weight `(out, n)` and bias `(out,)` of a consumer, whichever way round the model stores them.
Values = tuple[Tensor, "Tensor | None"]
# The kept units, ascending, by layer and name of the space.
Keep = Mapping[tuple[int, str], Sequence[int]]


def read_consumer(model: nn.Module, axis: Axis, dtype: torch.dtype | None = torch.float32) -> Values:
    """Copy the weight `(out, n)` and the bias `(out,)` of a consumer; `dtype=None` keeps its own dtype."""
    weight, bias = _views(model, axis)
    return _copies(weight, bias, dtype or weight.dtype)


def _copies(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Values:
    """Copy a weight and a bias in a dtype."""
    if bias is not None:
        bias = bias.to(dtype, copy=True)
    return weight.to(dtype, copy=True), bias


@torch.no_grad()
def write_consumer_(model: nn.Module, axis: Axis, columns: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Write new columns of a consumer, `weight` of shape `(out, kept)`, and its bias; all other columns become 0."""
    present_weight, present_bias = _views(model, axis)
    present_weight.zero_()
    present_weight[:, columns] = weight.to(present_weight)
    if bias is not None:
        assert present_bias is not None, "a refit has to give a bias only where there is one"
        present_bias.copy_(bias)


def units_to_columns(keep: Sequence[int], axis: Axis, device: torch.device) -> Tensor:
    """Return the columns of a consumer that belong to kept units, shape `(columns,)`."""
    return torch.tensor(axis.indices(keep), device=device)


def _views(model: nn.Module, axis: Axis) -> Values:
    """Return views of the weight, `(out, n)`, and the bias of a consumer; of one expert if the axis names one."""
    module = model.get_submodule(axis.module)
    leaf = axis.param.rpartition(".")[2]
    weight = module.get_parameter(leaf).detach()
    bias_name = "bias" if axis.part is None else f"{leaf}_bias"
    bias = getattr(module, bias_name, None)
    if bias is not None:
        bias = bias.detach()

    if axis.part is None:
        return weight.movedim(axis.dim, -1), bias
    if bias is not None:
        bias = bias[axis.part]
    return weight[axis.part].movedim(axis.dim - 1, -1), bias


@dataclass
class Masks:
    """The kept units of a model; the columns of all other units are zero.

    Consumers that are read or changed have to be in memory.

    Args:
        model: The model.
        arch: Its description.
        undoable: Whether to remember the dense values of all consumers that change, in the model's dtype.
        keep: The kept units so far.
        lost: Whether the model has lost values that cannot be restored.
    """

    model: PreTrainedModel
    arch: ArchSpec
    undoable: bool = True
    keep: dict[tuple[int, str], tuple[int, ...]] = field(default_factory=dict)
    lost: bool = False
    _dense: dict[Axis, Values] = field(default_factory=dict)

    def dense(self, axis: Axis) -> Values:
        """Copy the values of a consumer before any change, in fp32."""
        if axis not in self._dense:
            return read_consumer(self.model, axis)
        return _copies(*self._dense[axis], torch.float32)

    def write_(self, axis: Axis, columns: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        """Write the kept columns of a consumer, and mask all others; see `write_consumer_`."""
        if not self.undoable:
            self.lost = True
        elif axis not in self._dense:
            self._dense[axis] = read_consumer(self.model, axis, dtype=None)
        write_consumer_(self.model, axis, columns, weight, bias)

    def present(self, axes: Iterable[Axis]) -> dict[Axis, Values]:
        """Copy the present values of some consumers, in the model's dtype."""
        return {axis: read_consumer(self.model, axis, dtype=None) for axis in axes}

    @contextmanager
    def holding(self, values: Mapping[Axis, Values]) -> Iterator[None]:
        """Replace the values of consumers inside `with`; `values` are in the model's dtype."""
        present = self.present(values)
        self._put_(values)
        try:
            yield
        finally:
            self._put_(present)

    def lifted(self, axes: Iterable[Axis]) -> AbstractContextManager[None]:
        """Restore the dense values of consumers inside `with`."""
        values = {axis: self._dense[axis] for axis in axes if axis in self._dense}
        if not values:
            return nullcontext()
        return self.holding(values)

    def undo_(self, at: Callable[[int], AbstractContextManager[None]]) -> None:
        """Restore the dense values of every consumer, unless some are lost; `at` loads the weights of a layer."""
        if not self.lost:
            for layer in range(self.arch.num_layers):
                prefix = self.arch.layer_prefix(layer)
                values = {axis: dense for axis, dense in self._dense.items() if axis.param.startswith(prefix)}
                if values:
                    with at(layer):
                        self._put_(values)
        self._dense = {}

    @torch.no_grad()
    def _put_(self, values: Mapping[Axis, Values]) -> None:
        for axis, (weight, bias) in values.items():
            write_consumer_(self.model, axis, torch.arange(weight.shape[1], device=weight.device), weight, bias)


class Cut(NamedTuple):
    """A cut of a parameter along a dimension, of the whole tensor or of the matrix `part` of a stack."""

    dim: int
    part: int | None = None


def slice_tensors(
    tensors: Mapping[str, Tensor], spaces: Collection[Space], keep: Keep, device: torch.device | None = None
) -> dict[str, Tensor]:
    """Cut tensors down to the kept units.

    Args:
        tensors: The tensors by name. A tensor without pruned units is returned as it is.
        spaces: The spaces whose units are pruned.
        keep: The kept units.
        device: The device of the results; by default each stays where it is.
    """
    cuts: dict[str, dict[Cut, list[int]]] = {}
    for space in spaces:
        if space.key not in keep:
            continue
        for axis in space.axes:
            indices = cuts.setdefault(axis.param, {}).setdefault(Cut(axis.dim, axis.part), [])
            indices.extend(axis.indices(keep[space.key]))
    return {name: _sliced(tensor, cuts.get(name, {}), device) for name, tensor in tensors.items()}


def _sliced(tensor: Tensor, cuts: Mapping[Cut, Sequence[int]], device: torch.device | None) -> Tensor:
    """Cut a tensor down to the given indices."""
    cut_by_part = any(cut.part is not None for cut in cuts)
    # Removed matrices of a stack are not moved to another device in vain.
    removed_parts = device is not None and tensor.ndim > 2 and Cut(0) in cuts
    if cut_by_part or removed_parts:
        tensor = _sliced_stack(tensor, cuts, device)
        cuts = {cut: indices for cut, indices in cuts.items() if cut.part is None and cut.dim > 0}

    if device is not None:
        tensor = tensor.to(device)
    for cut, indices in cuts.items():
        tensor = tensor.index_select(cut.dim, torch.tensor(indices, device=tensor.device))
    return tensor


def _sliced_stack(tensor: Tensor, cuts: Mapping[Cut, Sequence[int]], device: torch.device | None) -> Tensor:
    """Cut the kept matrices of a stack one by one, and stack them again."""
    cuts_by_part: dict[int | None, dict[Cut, Sequence[int]]] = {}
    for cut, indices in cuts.items():
        cuts_by_part.setdefault(cut.part, {})[Cut(cut.dim - 1)] = indices

    kept_parts = cuts.get(Cut(0), range(len(tensor)))
    return torch.stack([_sliced(tensor[part], cuts_by_part.get(part, {}), device) for part in kept_parts])


@torch.no_grad()
def shrink_layer_(model: nn.Module, arch: ArchSpec, layer: int, keep: Keep, smaller: nn.Module) -> None:
    """Replace one layer by that of a `smaller` model without weights, filled with the kept units.

    The parameters are the same objects with less data in them, so that an optimizer still holds them. The layer is
    cut on its device if that has room for both layers. Otherwise it is cut in the CPU's memory, and the device never
    holds both. An error leaves the whole layer.
    """
    prefix = arch.layer_prefix(layer)
    whole = layer_list(model, arch)[layer]
    device = None if _has_room_to_cut(whole) else torch.device("cpu")
    tensors = {prefix + name: tensor for name, tensor in whole.state_dict().items()}
    state = tensors_under(slice_tensors(tensors, list(arch.at(layer)), keep, device), prefix)
    del tensors  # it holds the weights that the replacement frees
    fill_layer_(model, arch, layer, state, smaller)


def _has_room_to_cut(layer: nn.Module) -> bool:
    """Return whether the GPU of a layer has room for a second copy of it, and for a copy of its largest tensor."""
    parameters = list(layer.parameters())
    devices = {parameter.device for parameter in parameters}
    if len(devices) != 1:
        return False

    device = devices.pop()
    free = free_bytes(device)
    if device.type != "cuda" or free is None:
        return False
    sizes = [parameter.nbytes for parameter in parameters]
    return sum(sizes) + max(sizes) <= free


def fill_layer_(model: nn.Module, arch: ArchSpec, layer: int, state: Mapping[str, Tensor], smaller: nn.Module) -> None:
    """Replace one layer by that of a `smaller` model, filled with `state`; see `shrink_layer_`."""
    old, new = layer_list(model, arch)[layer], layer_list(smaller, arch)[layer]
    parameters = dict(old.named_parameters())
    device = next(iter(parameters.values())).device
    # Parameters are moved by `replace_`, once the old ones are freed. Buffers are small.
    state = {name: tensor if name in parameters else tensor.to(device) for name, tensor in state.items()}
    replace_(model, arch.layer_prefix(layer)[:-1], new, state, arch)


def tensors_under(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names begin with a prefix, by their names without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def check_same(what: str, masked: Tensor, pruned: Tensor) -> None:
    """Check that pruned units were masked before: their removal changes no output.

    The relative error of the median token may be 16 eps of the dtype, and at least 1e-2, which is ten steps of TF32.
    Tiny models of all families show at most 4 eps. Single tokens may differ more, since rounding may send them to
    another expert.

    Args:
        what: The layer or model, for the error.
        masked: The outputs while the units were masked, shape `(..., tokens, channels)`.
        pruned: The outputs without these units, of the same shape.

    Raises:
        StructPruneError: If the outputs differ by more than rounding explains.
    """
    limit = max(1e-2, 16 * torch.finfo(pruned.dtype).eps)
    masked, pruned = masked.float(), pruned.float()
    # Two states that are both zero are the same.
    norms = masked.norm(dim=-1).clamp(min=torch.finfo(masked.dtype).tiny)
    error = float(((pruned - masked).norm(dim=-1) / norms).median())
    # An error that is NaN is refused as well, unless the masked outputs were NaN or infinite already.
    if masked.isfinite().all() and not error <= limit:
        raise StructPruneError(
            f"{what} gives other outputs than with the removed units masked: they differ by {error:.2g} of their "
            f"norm, and rounding explains {limit:.2g}. The description of the model type does not fit this model."
        )
