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


# Weight `(out, n)` and bias `(out,)` of a consumer, whichever way round the model stores them.
Values = tuple[Tensor, "Tensor | None"]
# The kept units, ascending, by layer and name of the space.
Keep = Mapping[tuple[int, str], Sequence[int]]


def read_consumer(model: nn.Module, axis: Axis, dtype: torch.dtype | None = torch.float32) -> Values:
    """Copies of the weight `(out, n)` and the bias `(out,)` of a consumer; `dtype=None` keeps its own."""
    weight, bias = _views(model, axis)
    dtype = dtype or weight.dtype
    return weight.to(dtype, copy=True), None if bias is None else bias.to(dtype, copy=True)


@torch.no_grad()
def write_consumer_(model: nn.Module, axis: Axis, columns: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Give a consumer new columns, `weight` of shape `(out, kept)`, a bias, and zeros elsewhere."""
    present, old = _views(model, axis)
    present.zero_()
    present[:, columns] = weight.to(present)
    if bias is not None:
        assert old is not None, "a refit has to give a bias only where there is one"
        old.copy_(bias)


def units_to_columns(keep: Sequence[int], axis: Axis, device: torch.device) -> Tensor:
    """Kept columns of a consumer, from kept units."""
    return torch.tensor(axis.indices(keep), device=device)


def _views(model: nn.Module, axis: Axis) -> Values:
    """Views of a consumer's weight, `(out, n)`, and bias: those of one expert where the axis names one."""
    module, leaf = model.get_submodule(axis.module), axis.param.rpartition(".")[2]
    weight = module.get_parameter(leaf).detach()
    bias = getattr(module, "bias" if axis.part is None else f"{leaf}_bias", None)
    bias = None if bias is None else bias.detach()
    if axis.part is None:
        return weight.movedim(axis.dim, -1), bias
    return weight[axis.part].movedim(axis.dim - 1, -1), None if bias is None else bias[axis.part]


@dataclass
class Masks:
    """The units of a model that are kept so far; the columns of all others are zero.

    Where masks are `undoable`, the dense values of all that changes are remembered in the model's own dtype. What is
    read or changed has to be in memory.
    """

    model: PreTrainedModel
    arch: ArchSpec
    undoable: bool = True
    keep: dict[tuple[int, str], tuple[int, ...]] = field(default_factory=dict)
    lost: bool = False  # whether the model has lost something that cannot be put back
    _dense: dict[Axis, Values] = field(default_factory=dict)

    def dense(self, axis: Axis) -> Values:
        """Copies of the values that a consumer had before any change, in fp32."""
        if axis not in self._dense:
            return read_consumer(self.model, axis)
        weight, bias = self._dense[axis]
        return weight.to(torch.float32, copy=True), None if bias is None else bias.to(torch.float32, copy=True)

    def write_(self, axis: Axis, columns: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        """Give the kept columns of a consumer new values, and mask all others; see `write_consumer_`."""
        self.lost = self.lost or not self.undoable
        if self.undoable and axis not in self._dense:
            self._dense[axis] = read_consumer(self.model, axis, dtype=None)
        write_consumer_(self.model, axis, columns, weight, bias)

    def present(self, axes: Iterable[Axis]) -> dict[Axis, Values]:
        """Copies of the present values of some consumers, in the model's dtype."""
        return {axis: read_consumer(self.model, axis, dtype=None) for axis in axes}

    @contextmanager
    def holding(self, values: Mapping[Axis, Values]) -> Iterator[None]:
        """Give consumers other values, in the model's dtype, inside `with`."""
        present = self.present(values)
        self._put_(values)
        try:
            yield
        finally:
            self._put_(present)

    def lifted(self, axes: Iterable[Axis]) -> AbstractContextManager[None]:
        """Give consumers their dense values inside `with`."""
        values = {axis: self._dense[axis] for axis in axes if axis in self._dense}
        return self.holding(values) if values else nullcontext()

    def undo_(self, at: Callable[[int], AbstractContextManager[None]]) -> None:
        """Make every consumer dense again, unless something has been lost; `at` brings the weights of a layer in."""
        for layer in () if self.lost else range(self.arch.num_layers):
            prefix = self.arch.layer_prefix(layer)
            if values := {axis: dense for axis, dense in self._dense.items() if axis.param.startswith(prefix)}:
                with at(layer):
                    self._put_(values)
        self._dense = {}

    @torch.no_grad()
    def _put_(self, values: Mapping[Axis, Values]) -> None:
        for axis, (weight, bias) in values.items():
            write_consumer_(self.model, axis, torch.arange(weight.shape[1], device=weight.device), weight, bias)


class Cut(NamedTuple):
    """A cut of a parameter along a dimension, with a `part` only at that index of dimension 0."""

    dim: int
    part: int | None = None


def slice_tensors(
    tensors: Mapping[str, Tensor], spaces: Collection[Space], keep: Keep, device: str | None = None
) -> dict[str, Tensor]:
    """Cut tensors by name down to the kept units; the results are on `device`, by default where each is."""
    cuts: dict[str, dict[Cut, list[int]]] = {}
    for space in spaces:
        for axis in space.axes if space.key in keep else ():
            cuts_of_param = cuts.setdefault(axis.param, {})
            cuts_of_param.setdefault(Cut(axis.dim, axis.part), []).extend(axis.indices(keep[space.key]))
    return {name: _sliced(tensor, cuts.get(name, {}), device) for name, tensor in tensors.items()}


def _sliced(tensor: Tensor, cuts: Mapping[Cut, Sequence[int]], device: str | None) -> Tensor:
    """A tensor cut down to the given indices; stacked matrices are cut one by one, and only those that are kept."""
    if any(cut.part is not None for cut in cuts) or device is not None and tensor.ndim > 2 and Cut(0) in cuts:
        kept = cuts.get(Cut(0), range(len(tensor)))
        by_part: dict[int | None, dict[Cut, Sequence[int]]] = {}
        for cut, indices in cuts.items():
            by_part.setdefault(cut.part, {})[Cut(cut.dim - 1)] = indices
        tensor = torch.stack([_sliced(tensor[part], by_part.get(part, {}), device) for part in kept])
        cuts = {cut: indices for cut, indices in cuts.items() if cut.part is None and cut.dim}
    tensor = tensor if device is None else tensor.to(device)
    for cut, indices in cuts.items():
        tensor = tensor.index_select(cut.dim, torch.tensor(indices, device=tensor.device))
    return tensor


@torch.no_grad()
def shrink_layer_(model: nn.Module, arch: ArchSpec, layer: int, keep: Keep, smaller: nn.Module) -> None:
    """Replace one layer by that of a `smaller` model without weights, filled with the kept units.

    The parameters are the same objects with less data in them, so that an optimizer still holds them. The layer is
    made in the CPU's memory, so another device never has both, and an error leaves the whole one.
    """
    prefix = arch.layer_prefix(layer)
    full = {prefix + name: tensor for name, tensor in layer_list(model, arch)[layer].state_dict().items()}
    state = tensors_under(slice_tensors(full, list(arch.at(layer)), keep, "cpu"), prefix)
    del full  # it holds the weights that are about to go
    fill_layer_(model, arch, layer, state, smaller)


def fill_layer_(model: nn.Module, arch: ArchSpec, layer: int, state: Mapping[str, Tensor], smaller: nn.Module) -> None:
    """Replace one layer by that of a `smaller` model, filled with `state`; see `shrink_layer_`."""
    old, new = layer_list(model, arch)[layer], layer_list(smaller, arch)[layer]
    weights = dict(old.named_parameters())
    device = next(iter(weights.values())).device
    state = {name: tensor if name in weights else tensor.to(device) for name, tensor in state.items()}
    replace_(model, arch.layer_prefix(layer)[:-1], new, state, arch)


def tensors_under(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with a prefix, by their names without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def check_same(what: str, masked: Tensor, pruned: Tensor) -> None:
    """Refuse other outputs, shape `(…, tokens, channels)`, than those while the units were masked.

    The median token may be off by ten steps of TF32 or 16 of the dtype; tiny models of all families show at most 4.
    Rounding may send single tokens to another expert.
    """
    eps = torch.finfo(pruned.dtype).eps
    masked, pruned = masked.float(), pruned.float()
    # Two states that are both zero are the same.
    norms, limit = masked.norm(dim=-1).clamp(min=torch.finfo(masked.dtype).tiny), max(1e-2, 16 * eps)
    errors = (pruned - masked).norm(dim=-1) / norms
    if masked.isfinite().all() and not (error := float(errors.median())) <= limit:
        raise StructPruneError(
            f"{what} gives other outputs than with the removed units masked: they differ by {error:.2g} of their "
            f"norm, and rounding explains {limit:.2g}. The description of the model type does not fit this model."
        )
