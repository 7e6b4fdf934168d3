"""Weights that read what a space numbers: how they are read, masked and put back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn

from ..arch.spec import Axis
from ..forward.placement import Placement


# Weight `(out, n)` and bias `(out,)` of a consumer, whichever way round the model stores them.
Values = tuple[Tensor, "Tensor | None"]


def read_consumer(model: nn.Module, axis: Axis) -> Values:
    """Weight `(out, n)` and bias `(out,)` of a consumer as fp32 copies, whichever way round it is stored."""
    return _copied(_views(model, axis), torch.float32)


@torch.no_grad()
def write_consumer_(model: nn.Module, axis: Axis, columns: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Give a consumer new columns and zeros everywhere else: the layer then computes what the smaller layer will.
    `weight` has the shape `(out, kept)`, `bias` `(out,)`.
    """
    present, old = _views(model, axis)
    present.zero_()
    present[:, columns] = weight.to(present)
    if bias is None:
        return
    if old is not None:
        old.copy_(bias)
    else:
        module = model.get_submodule(axis.module)
        trained = module.get_parameter(axis.param.rpartition(".")[2]).requires_grad
        module.bias = nn.Parameter(bias.to(present), requires_grad=trained)


def units_to_columns(keep: Sequence[int], axis: Axis, device: torch.device) -> Tensor:
    """Kept columns of a consumer, from kept units."""
    return torch.tensor(axis.indices(keep), device=device)


class Consumers:
    """The consumers of a model that is being pruned, with the dense values of those that have been changed.

    A removed unit is masked: its columns are zero. The dense values are remembered in the model's own dtype, so every
    change can be undone exactly until `forget` is called.
    """

    def __init__(self, model: nn.Module, placement: Placement):
        self.model, self.placement = model, placement
        self._dense: dict[Axis, Values] = {}

    def present(self, axis: Axis) -> Values:
        """The values as they are, as fp32 copies."""
        return self._read(axis, torch.float32)

    def dense(self, axis: Axis) -> Values:
        """The values before any change, as fp32 copies."""
        return _copied(self._dense[axis], torch.float32) if axis in self._dense else self.present(axis)

    def mask_(self, axis: Axis, columns: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        """Give the kept columns new values and mask all others; see `write_consumer_`."""
        self._remember([axis])
        with self.placement.of(axis.module, changes=True):
            write_consumer_(self.model, axis, columns, weight, bias)

    def copies(self, axes: Iterable[Axis]) -> dict[Axis, Values]:
        """Copies of the present values of some consumers, in the model's dtype."""
        return {axis: self._read(axis) for axis in axes}

    @contextmanager
    def holding(self, values: Mapping[Axis, Values]) -> Iterator[None]:
        """Consumers that have other values inside `with`."""
        present = self.copies(values)
        self._put_(values)
        try:
            yield
        finally:
            self._put_(present)

    def as_dense(self, axes: Iterable[Axis]) -> AbstractContextManager[None]:
        """Consumers that have their dense values inside `with`."""
        return self.holding({axis: self._dense[axis] for axis in axes if axis in self._dense})

    def restore_(self, values: Mapping[Axis, Values]) -> None:
        """Go back to what `copies` gave; consumers that it does not name become dense again."""
        self._remember(values)
        self._put_({**self._dense, **values})

    def undo_(self) -> None:
        """Make every consumer dense again."""
        self._put_(self._dense)
        self._dense = {}

    def forget(self, axes: Iterable[Axis]) -> None:
        """Drop the dense values of consumers whose removed columns have left the model."""
        for axis in axes:
            self._dense.pop(axis, None)

    def _remember(self, axes: Iterable[Axis]) -> None:
        self._dense |= self.copies(axis for axis in axes if axis not in self._dense)

    @torch.no_grad()
    def _put_(self, values: Mapping[Axis, Values]) -> None:
        for axis, (weight, bias) in values.items():
            with self.placement.of(axis.module, changes=True):
                every = torch.arange(weight.shape[1], device=weight.device)
                write_consumer_(self.model, axis, every, weight, bias)
                if bias is None and _views(self.model, axis)[1] is not None:
                    self.model.get_submodule(axis.module).bias = None  # type: ignore[assignment]  # a refit added it

    def _read(self, axis: Axis, dtype: torch.dtype | None = None) -> Values:
        with self.placement.of(axis.module):
            return _copied(_views(self.model, axis), dtype)


def _copied(values: Values, dtype: torch.dtype | None = None) -> Values:
    weight, bias = values
    dtype = dtype or weight.dtype
    return weight.to(dtype, copy=True), None if bias is None else bias.to(dtype, copy=True)


def _views(model: nn.Module, axis: Axis) -> Values:
    """Views of a consumer's weight, `(out, n)`, and bias: those of one expert where the axis names one."""
    module, leaf = model.get_submodule(axis.module), axis.param.rpartition(".")[2]
    weight = module.get_parameter(leaf).detach()
    bias = getattr(module, "bias" if axis.part is None else f"{leaf}_bias", None)
    bias = None if bias is None else bias.detach()
    if axis.part is None:
        return weight.movedim(axis.dim, -1), bias
    return weight[axis.part].movedim(axis.dim - 1, -1), None if bias is None else bias[axis.part]
