"""The layers of a model, run one at a time on stored inputs."""

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
from ..system.offloading import compute_device, is_offloaded
from .calls import Call, NotSequentialError, capture, first_of, same_call
from .clock import Clock
from .hooks import replaying


@dataclass(frozen=True)
class Batch:
    """Samples of one domain that go through the model together.

    Attributes:
        domain: The number of the domain.
        ids: The token ids, shape `(batch, seq_length)`.
        mask: Which tokens are calibrated on, of the same shape; None stands for all.
    """

    domain: int
    ids: Tensor
    mask: Tensor | None = None


class LayerRunner:
    """Runs single layers on the hidden states of samples, as the model would.

    Attributes:
        device: The device that computes the first layer.
        hidden: The hidden states of every batch, shape `(batch, seq_length, channels)`.
    """

    def __init__(self, model: PreTrainedModel, arch: ArchSpec, batches: Sequence[Batch], clock: Clock | None = None):
        self.model, self.arch = model, arch
        self.device = compute_device(model)
        # The hidden states of all samples may take more memory than the layers that a GPU has room for.
        stored = torch.device("cpu") if is_offloaded(model) else None
        self.clock = clock or Clock(self.device)
        self.batches = list(batches)
        self.hidden: list[Tensor] = []
        self.calls: dict[int, list[Call]] = {}
        # What a layer returns beside hidden states; None where it returns them alone.
        self.extras: dict[int, tuple[Any, ...] | None] = {}
        for batch in batches:
            size = len(batch.ids)
            with self.clock.running(batch.domain):
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
        with self.clock.running(self.batches[index].domain):
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
