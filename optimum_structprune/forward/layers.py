"""The layers of a model, run one at a time on stored inputs, as the model calls them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import convert_to_fp32, send_to_device
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..arch.load import layer_list
from ..arch.spec import ArchSpec
from ..errors import StructPruneError
from ..system.offloading import compute_device, is_offloaded
from .hooks import StopForward, first_of, hidden_states_of, intercept, replaying
from .metrics import evaluating, run_model


@dataclass(frozen=True)
class Call:
    """The arguments that the model calls one layer with, without the hidden states, which are given `by_name`, as
    `hidden_states`, or as the first argument.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    by_name: bool


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))


def equal(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors have the same shape and values; they may be on different devices."""
    return first is second or (first.shape == second.shape and torch.equal(first, second.to(first.device)))


def same_call(first: Call, second: Call) -> bool:
    """Whether two calls have the same tensors among their arguments."""
    pairs = list(zip(_tensors((first.args, first.kwargs)), _tensors((second.args, second.kwargs)), strict=True))
    return all(equal(a, b) for a, b in pairs)


class NotSequentialError(StructPruneError):
    """The model's layers cannot be run one by one."""


@torch.no_grad()
def capture(model: PreTrainedModel, arch: ArchSpec, ids: Tensor, whole: bool) -> tuple[Tensor, list[Call]]:
    """The hidden states that enter the first layer, and how the model calls its layers.

    The calls carry masks and rotary embeddings, which may differ by layer type. `ids` has the shape `(batch,
    seq_length)`, the hidden states `(batch, seq_length, channels)`; there is one call per layer that was recorded.
    """
    first: list[Tensor] = []
    calls: list[Call] = []
    outputs: list[Tensor] = []

    def before(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        by_name = "hidden_states" in kwargs
        hidden = hidden_states_of(args, kwargs)
        rest = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        if index and not equal(hidden, outputs[-1]):
            raise NotSequentialError(f"the model changes hidden states between layers {index - 1} and {index}")
        if not index:
            first.append(hidden)
        calls.append(Call(args if by_name else args[1:], rest, by_name))
        # What follows the last layer, such as the logits of a large vocabulary, may take more memory than all layers.
        if not whole or len(calls) == arch.num_layers:
            raise StopForward

    def after(index: int, output: Any) -> None:
        outputs[:] = [first_of(output)]

    with intercept(layer_list(model, arch), before, after):
        try:
            run_model(model, ids)
        except StopForward:
            pass
    return first[0], calls


@dataclass(frozen=True)
class Batch:
    """Samples of the domain with a number that go through the model together: token ids, shape `(batch, seq_length)`,
    and a mask of that shape, which says what tokens are calibrated on; None stands for all.
    """

    domain: int
    ids: Tensor
    mask: Tensor | None = None


class LayerRunner:
    """Runs single layers, as the model would, on the `hidden` states of every batch, shape `(batch, seq_length,
    channels)`; `device` is the one that computes the first layer.
    """

    def __init__(self, model: PreTrainedModel, arch: ArchSpec, batches: Sequence[Batch]):
        self.model, self.arch = model, arch
        self.device = compute_device(model)
        # The hidden states of all samples may take more memory than the layers that a GPU has room for.
        stored = torch.device("cpu") if is_offloaded(model) else None
        self.batches = list(batches)
        self.hidden: list[Tensor] = []
        self.calls: dict[int, list[Call]] = {}
        # What a layer returns beside hidden states; None where it returns them alone.
        self.extras: dict[int, tuple[Any, ...] | None] = {}
        for batch in batches:
            size = len(batch.ids)
            hidden, calls = capture(model, arch, batch.ids, size not in self.calls)
            if not same_call(self.calls.setdefault(size, calls)[0], calls[0]):
                raise NotSequentialError(f"the layers of {arch.model_type!r} are called with more than hidden states")
            self.hidden.append(hidden if stored is None else hidden.to(stored))

    def pass_through(self, layer: int) -> None:
        """Take the hidden states of all samples through a layer."""
        for index, hidden in enumerate(self.hidden):
            self.hidden[index] = self.output(layer, index).to(hidden.device)

    @contextmanager
    def skipping(self, count: int, index: int) -> Iterator[None]:
        """The first layers do not run inside `with`: they give the stored hidden states of one batch."""
        hidden = self.hidden[index]
        outputs = [hidden if (extras := self.extras[layer]) is None else (hidden, *extras) for layer in range(count)]
        with replaying(layer_list(self.model, self.arch)[:count], outputs):
            yield

    @torch.no_grad()
    def output(self, layer: int, index: int, hidden: Tensor | None = None) -> Tensor:
        """What a layer gives for one batch, in the layer's own precision. `hidden` has the shape `(batch, seq_length,
        hidden)`.
        """
        hidden = self.hidden[index] if hidden is None else hidden
        call = self.calls[len(hidden)][layer]
        module = self._layer(layer)
        like = next(module.parameters())
        hidden, args, kwargs = send_to_device((hidden, call.args, call.kwargs), like.device)
        if like.dtype == torch.float32:
            hidden, args, kwargs = convert_to_fp32((hidden, args, kwargs))
        output = module(hidden_states=hidden, **kwargs) if call.by_name else module(hidden, *args, **kwargs)
        self.extras[layer] = output[1:] if isinstance(output, tuple) else None
        return first_of(output)

    def _layer(self, layer: int) -> nn.Module:
        # Looked up anew each time, since a layer is replaced when it shrinks.
        return layer_list(self.model, self.arch)[layer]

    def _device(self, layer: int) -> torch.device:
        return next(self._layer(layer).parameters()).device

    def _local(self, layer: int, name: str) -> str:
        return name.removeprefix(self.arch.layer_prefix(layer))

    def _module(self, layer: int, name: str) -> nn.Module:
        return self._layer(layer).get_submodule(self._local(layer, name))


def check_sequential(model: PreTrainedModel, arch: ArchSpec) -> None:
    """Refuse a model whose layers cannot run one by one, which an offloaded one has to."""
    if model.main_input_name != "input_ids":
        return
    texts = [torch.tensor([row]) for row in ((0, 1, 2, 3), (3, 2, 1, 0))]
    try:
        with evaluating(model):
            LayerRunner(model, arch, [Batch(0, ids) for ids in texts])
    except NotSequentialError as error:
        raise must_be_whole(arch, error) from error


def must_be_whole(arch: ArchSpec, error: NotSequentialError) -> StructPruneError:
    """The refusal of an offloaded model whose layers cannot be run one by one."""
    return StructPruneError(
        f"{error}, so the layers cannot be brought in one by one; load the {arch.model_type} model in memory, or over "
        "several devices."
    )
