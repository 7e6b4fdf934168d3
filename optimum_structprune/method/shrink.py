"""Read, write and mask the weights of consumers, and cut a layer down to the kept units."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..arch.devices import free_bytes
from ..arch.modules import layer_list, replace_
from ..arch.spec import ArchSpec, Axis, Space
from ..system.errors import StructPruneError


# Weight `(out, n)` and bias `(out,)` of a consumer, whichever way round the model stores them.
Values = tuple[Tensor, "Tensor | None"]
# The kept units, ascending, by layer and name of the space.
Keep = Mapping[tuple[int, str], Sequence[int]]


def read_consumer(model: nn.Module, axis: Axis, dtype: torch.dtype | None = torch.float32) -> Values:
    """Copy the weight `(out, n)` and the bias `(out,)` of a consumer. `dtype=None` keeps the model's dtype."""
    weight, bias = _views(model, axis)
    return _copies(weight, bias, dtype or weight.dtype)


def _copies(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Values:
    """Copy a weight and a bias in a dtype."""
    if bias is not None:
        bias = bias.to(dtype, copy=True)
    return weight.to(dtype, copy=True), bias


@torch.no_grad()
def write_consumer_(model: nn.Module, axis: Axis, columns: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Write new columns of a consumer, `weight` of shape `(out, columns)`, and its bias. Set other columns to 0."""
    target_weight, target_bias = _views(model, axis)
    target_weight.zero_()
    target_weight[:, columns] = weight.to(target_weight)
    if bias is not None:
        assert target_bias is not None, "a refit returned a bias for a consumer without one"
        target_bias.copy_(bias)


def units_to_columns(keep: Sequence[int], axis: Axis, device: torch.device) -> Tensor:
    """Return the columns of a consumer that belong to kept units, shape `(columns,)`."""
    return torch.tensor(axis.indices(keep), device=device)


def _views(model: nn.Module, axis: Axis) -> Values:
    """Return views of the weight `(out, n)` and the bias of a consumer, or of one expert if the axis has a part."""
    module = model.get_submodule(axis.module)

    leaf = axis.param.rpartition(".")[2]
    weight = module.get_parameter(leaf).detach()

    if axis.part is None:
        bias = getattr(module, "bias", None)
        if bias is not None:
            bias = bias.detach()
        return weight.movedim(axis.dim, -1), bias

    bias = getattr(module, f"{leaf}_bias", None)
    if bias is not None:
        bias = bias.detach()[axis.part]
    return weight[axis.part].movedim(axis.dim - 1, -1), bias


@dataclass
class Masks:
    """The kept units of a model. The columns of all other units are zero.

    Consumers that are read or changed must be in memory.

    Args:
        model: The model.
        arch: The description of the model.
        undoable: Whether to store the original values of all consumers that change, in the model's dtype.
        keep: The kept units so far.
        irreversible: Whether values of the model have been overwritten that cannot be restored.
    """

    model: PreTrainedModel
    arch: ArchSpec
    undoable: bool = True
    keep: dict[tuple[int, str], tuple[int, ...]] = field(default_factory=dict)
    irreversible: bool = False
    _original: dict[Axis, Values] = field(default_factory=dict)

    def original(self, axis: Axis) -> Values:
        """Copy the values of a consumer before any change, in fp32."""
        if axis not in self._original:
            return read_consumer(self.model, axis)
        weight, bias = self._original[axis]
        return _copies(weight, bias, torch.float32)

    def write_(self, axis: Axis, columns: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        """Write the kept columns of a consumer, and mask all other columns; see `write_consumer_`."""
        if not self.undoable:
            self.irreversible = True
        elif axis not in self._original:
            self._original[axis] = read_consumer(self.model, axis, dtype=None)
        write_consumer_(self.model, axis, columns, weight, bias)

    def current(self, axes: Iterable[Axis]) -> dict[Axis, Values]:
        """Copy the current values of some consumers, in the model's dtype."""
        return {axis: read_consumer(self.model, axis, dtype=None) for axis in axes}

    @contextmanager
    def holding(self, values: Mapping[Axis, Values]) -> Iterator[None]:
        """Replace the values of consumers inside `with`. `values` are in the model's dtype."""
        current = self.current(values)
        self._put_(values)
        try:
            yield
        finally:
            self._put_(current)

    def lifted(self, axes: Iterable[Axis]) -> AbstractContextManager[None]:
        """Restore the original values of consumers inside `with`."""
        values = {axis: self._original[axis] for axis in axes if axis in self._original}
        if not values:
            return nullcontext()
        return self.holding(values)

    def undo_(self, at: Callable[[int], AbstractContextManager[None]]) -> None:
        """Restore the original values of all consumers, unless the masks are irreversible.

        Args:
            at: A context manager that loads the weights of a layer.
        """
        if not self.irreversible:
            for layer in range(self.arch.num_layers):
                prefix = self.arch.layer_prefix(layer)
                values = {axis: original for axis, original in self._original.items() if axis.param.startswith(prefix)}
                if values:
                    with at(layer):
                        self._put_(values)

        self._original = {}

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
        tensors: The tensors by name. A tensor without pruned units is returned unchanged.
        spaces: The spaces whose units are pruned.
        keep: The kept units.
        device: The device of the results. By default, a tensor is cut on its own device.
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

    # Cut a stack part by part, so that its removed matrices are not moved to the other device.
    moves_stack = device is not None and tensor.ndim > 2 and Cut(0) in cuts
    if cut_by_part or moves_stack:
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
    """Replace one layer by the layer of a `smaller` model without weights, and fill it with the kept units.

    The parameters are the same objects with less data, so that an optimizer still holds them. The layer is cut on its
    device if both layers fit there. Otherwise it is cut in CPU memory, and the device never holds both. If an error
    occurs, the model keeps the original layer.
    """
    prefix = arch.layer_prefix(layer)
    original_layer = layer_list(model, arch)[layer]
    device = None
    if not _has_room_to_cut(original_layer):
        device = torch.device("cpu")

    tensors = {prefix + name: tensor for name, tensor in original_layer.state_dict().items()}
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
    available = free_bytes(device)
    if device.type != "cuda" or available is None:
        return False

    sizes = [parameter.nbytes for parameter in parameters]
    return sum(sizes) + max(sizes) <= available


def fill_layer_(model: nn.Module, arch: ArchSpec, layer: int, state: Mapping[str, Tensor], smaller: nn.Module) -> None:
    """Replace one layer by the layer of a `smaller` model, and fill it with `state`; see `shrink_layer_`."""
    original_layer = layer_list(model, arch)[layer]
    small_layer = layer_list(smaller, arch)[layer]
    parameters = dict(original_layer.named_parameters())
    device = next(iter(parameters.values())).device

    # Move only the buffers, which are small. `replace_` moves parameters after it has freed the original ones.
    tensors = dict(state)
    for name, tensor in state.items():
        if name not in parameters:
            tensors[name] = tensor.to(device)
    replace_(model, arch.layer_prefix(layer)[:-1], small_layer, tensors, arch)


def tensors_under(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names begin with a prefix, by their names without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def check_same(what: str, masked: Tensor, pruned: Tensor) -> None:
    """Check that the removal of masked units changes no output.

    The relative error of the median token may be 16 eps of the dtype, and at least 1e-2, which is ten steps of TF32.
    Tiny models of all families show at most 4 eps. Single tokens may differ more, because rounding may route them to
    another expert.

    Args:
        what: The layer or model, for the error.
        masked: The outputs while the units were masked, shape `(..., tokens, channels)`.
        pruned: The outputs without these units, of the same shape.

    Raises:
        StructPruneError: If the outputs differ by more than rounding.
    """
    limit = max(1e-2, 16 * torch.finfo(pruned.dtype).eps)
    masked = masked.float()
    pruned = pruned.float()

    # The minimum avoids a division by zero, so that two states that are both zero are the same.
    norms = masked.norm(dim=-1).clamp(min=torch.finfo(masked.dtype).tiny)
    error = float(((pruned - masked).norm(dim=-1) / norms).median())

    # An error that is NaN raises as well, unless the masked outputs were NaN or infinite already.
    if masked.isfinite().all() and not error <= limit:
        raise StructPruneError(
            f"{what} gives other outputs than with the removed units masked: they differ by {error:.2g} of their "
            f"norm, and rounding explains {limit:.2g}. The description of the model type does not fit this model."
        )
