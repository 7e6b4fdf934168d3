"""One layer of the model at a time, on stored inputs."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import torch
from accelerate.utils import convert_to_fp32, send_to_device
from torch import Tensor, nn

from ..arch.load import layer_list
from ..arch.spec import ArchSpec, Axis, Space
from ..forward.calls import Call, NotSequentialError, capture, first_of, same_call
from ..forward.clock import Clock
from ..forward.hooks import adding, observe
from .experts import Routed, contributions, inner_moments
from .moments import Moments
from .tally import Batch, Tally, finite, listen


if TYPE_CHECKING:
    from transformers import PreTrainedModel


# How much of a module's output may do something else than go straight into the stream.
CROOKED = 0.1


class LayerPasses:
    """One layer at a time, on stored inputs that have come through the layers already pruned.

    Memory: the hidden states of the calibration set (twice with error feedback) and one layer's statistics; where a
    layer has experts, also what it routes to them, but the statistics of only one expert.

    Args:
        model: The model.
        arch: Its description.
        batches: Samples.
        clock: Takes the time of each domain.
        error_feedback: Share of the error so far, the dense model's stream less the present one, that consumers whose
            output goes straight into the stream are told to make up for.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        arch: ArchSpec,
        batches: Sequence[Batch],
        clock: Clock | None = None,
        error_feedback: float = 0.0,
    ):
        self.model, self.arch, self.error_feedback = model, arch, error_feedback
        self.gains: dict[str, float] = {}
        self.device = next(model.parameters()).device
        self.clock = clock or Clock(self.device)
        self.domains = [batch.domain for batch in batches]
        self.batches = list(batches)
        self.hidden: list[Tensor] = []
        self.calls: dict[int, list[Call]] = {}
        self.routed: tuple[Routed, ...] = ()
        for batch in batches:
            size = len(batch.ids)
            with self.clock.running(batch.domain):
                hidden, calls = capture(model, arch, batch.ids, whole=size not in self.calls)
            if not same_call(self.calls.setdefault(size, calls)[0], calls[0]):
                raise NotSequentialError(f"the layers of {arch.model_type!r} are called with more than hidden states")
            self.hidden.append(hidden)
        self.dense = list(self.hidden)

    def gather(self, layer: int, space: Space, gram: bool) -> list[list[Moments]]:
        """See `Passes.gather`."""
        if space.experts is not None:
            experts = self._experts(layer, space.experts)
            # The experts of a layer see the same stream, whichever of them is pruned first.
            self.routed = self.routed or self._route(layer, experts)
            return [finite(space, inner_moments(experts, space, self.routed, gram, 1 + max(self.domains)))]
        self.routed = ()
        local = {self._local(layer, axis): axis.module for axis in space.into}
        gains = {local[name]: gain for name in local if self.error_feedback and (gain := self._gain(layer, name))}
        tally = Tally([space], gram, 1 + max(self.domains), self.device, gains, self.hidden[0].shape[-1])
        with observe(self._layer(layer), local, lambda name, x: tally.see(local[name], x)):
            for index, batch in enumerate(self.batches):
                tally.batch = batch
                output = self._run(layer, index)
                if gains:
                    tally.settle(self.error_feedback * (self.dense[index].float() - output.float()))
        return tally.of(space)

    def contributions(self, layer: int, space: Space) -> Tensor:
        """See `Passes.contributions`."""
        experts = self._experts(layer, str(space.experts))
        return contributions(experts, space.size, self._route(layer, experts), 1 + max(self.domains))

    def follow(self, layer: int, kinds: Collection[str]) -> None:
        """See `Passes.follow`; where nothing in the first layer can correct, there is no error feedback in any."""
        if self.error_feedback and layer == 0:
            spaces = [space for space in self.arch.at(0) if space.kind in kinds and space.experts is None]
            if not any(self._gain(0, self._local(0, axis)) for space in spaces for axis in space.into):
                self.error_feedback = 0.0
        if self.error_feedback:
            for index, hidden in enumerate(self.dense):
                self.dense[index] = self._run(layer, index, hidden)

    def advance(self, layer: int) -> None:
        """See `Passes.advance`."""
        self.routed = ()
        if layer + 1 == self.arch.num_layers:
            return  # nothing reads what the last layer gives
        for index in range(len(self.hidden)):
            self.hidden[index] = self._run(layer, index)

    def _layer(self, layer: int) -> nn.Module:
        # Asked for anew each time, since a layer is replaced when it shrinks.
        return layer_list(self.model, self.arch)[layer]

    def _local(self, layer: int, axis: Axis) -> str:
        return axis.module.removeprefix(self.arch.layer_prefix(layer))

    def _experts(self, layer: int, name: str) -> nn.Module:
        return self._layer(layer).get_submodule(name.removeprefix(self.arch.layer_prefix(layer)))

    def _route(self, layer: int, experts: nn.Module) -> tuple[Routed, ...]:
        return listen(experts, self.batches, lambda index: self._run(layer, index))

    @torch.no_grad()
    def _gain(self, layer: int, name: str) -> float:
        """What a module's output is multiplied by on its way into the layer's output; 0 where it does not go straight.

        Noise on the output tells. It is as large as the stream, so that rounding does not hide it.
        """
        if name not in self.gains:
            index = min(range(len(self.hidden)), key=lambda index: len(self.hidden[index]))
            hidden = self.hidden[index]
            noise = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0)).to(hidden.device)
            noise *= hidden.float().std()
            plain = self._run(layer, index).float()
            with adding(self._layer(layer).get_submodule(name), noise):
                moved = (self._run(layer, index).float() - plain).to(noise.device)
            gain = float((moved * noise).sum() / noise.square().sum())
            rest = float((moved - gain * noise).norm() / noise.norm())
            self.gains[name] = gain if rest < CROOKED * abs(gain) else 0.0
        return self.gains[name]

    @torch.no_grad()
    def _run(self, layer: int, index: int, hidden: Tensor | None = None) -> Tensor:
        """What layer `layer` makes of one batch, or of other hidden states for it, in the layer's own precision."""
        hidden = self.hidden[index] if hidden is None else hidden
        call = self.calls[len(hidden)][layer]
        module = self._layer(layer)
        like = next(module.parameters())
        hidden, args, kwargs = send_to_device((hidden, call.args, call.kwargs), like.device)
        if like.dtype == torch.float32:
            hidden, args, kwargs = convert_to_fp32((hidden, args, kwargs))
        with self.clock.running(self.domains[index]):
            output = module(hidden_states=hidden, **kwargs) if call.by_name else module(hidden, *args, **kwargs)
        return first_of(output)
