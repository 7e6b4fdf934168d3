"""Runs the calibration blocks through the model and gathers moments at the taps."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from accelerate.utils import convert_to_fp32, send_to_device
from torch import Tensor, nn

from ..arch.load import block_list
from ..arch.spec import ArchSpec, Axis, Space
from ..metrics import run_model
from .calls import Call, first_of, same_call
from .capture import NotSequentialError, capture
from .clock import Clock
from .collect import adding, observe
from .experts import Routed, contributions, inner_moments
from .stats import Moments
from .taps import Batch, Tally, finite, listen


if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .blocks import Domain


# How much of a module's output may do something else than go straight into the stream.
CROOKED = 0.1


class Passes(Protocol):
    """Forward passes over the calibration blocks, seen by one block of the model after the other."""

    def gather(self, layer: int, space: Space, gram: bool) -> list[list[Moments]]:
        """Moments of the inputs of the space's consumers: for each consumer, one per domain."""
        ...

    def contributions(self, layer: int, space: Space) -> Tensor:
        """How much each expert of a space of whole experts contributes, shape `(domains, experts)`."""
        ...

    def follow(self, layer: int, kinds: Collection[str]) -> None:
        """Block `layer` has its dense weights; what corrects errors takes the dense stream through it.

        Args:
            layer: Index of the block.
            kinds: Kinds of space that are pruned.
        """
        ...

    def advance(self, layer: int) -> None:
        """Block `layer` has its final weights for this round; go on to the next."""
        ...


def batches_of(domains: Sequence[Domain], batch_size: int) -> list[Batch]:
    """Cut every domain into batches; no batch holds two domains."""
    return [
        Batch(index, ids, mask)
        for index, domain in enumerate(domains)
        for ids, mask in zip(domain.blocks.split(batch_size), _masks(domain, batch_size), strict=True)
        if len(ids)
    ]


def _masks(domain: Domain, batch_size: int) -> Sequence[Tensor | None]:
    if domain.mask is None:
        return [None] * len(domain.blocks.split(batch_size))
    return domain.mask.split(batch_size)


class BlockPasses:
    """One block at a time, on stored inputs that have come through the blocks already pruned.

    Memory: the hidden states of the calibration set (twice with a correction) and one block's statistics; where a
    block has experts, also what it routes to them, but the statistics of only one expert.

    Args:
        model: The model.
        spec: Its description.
        batches: Token blocks.
        clock: Takes the time of each domain.
        correction: Share of the error so far, the dense model's stream less the present one, that consumers whose
            output goes straight into the stream are told to make up for.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        spec: ArchSpec,
        batches: Sequence[Batch],
        clock: Clock | None = None,
        correction: float = 0.0,
    ):
        self.model, self.spec, self.correction = model, spec, correction
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
                hidden, calls = capture(model, spec, batch.ids, whole=size not in self.calls)
            if not same_call(self.calls.setdefault(size, calls)[0], calls[0]):
                raise NotSequentialError(f"the blocks of {spec.model_type!r} are called with more than hidden states")
            self.hidden.append(hidden)
        self.dense = list(self.hidden)

    def gather(self, layer: int, space: Space, gram: bool) -> list[list[Moments]]:
        """See `Passes.gather`."""
        if space.experts is not None:
            experts = self._experts(layer, space.experts)
            # The experts of a block see the same stream, whichever of them is pruned first.
            self.routed = self.routed or self._route(layer, experts)
            return [finite(space, inner_moments(experts, space, self.routed, gram, 1 + max(self.domains)))]
        self.routed = ()
        local = {self._local(layer, axis): axis.module for axis in space.into}
        gains = {local[name]: gain for name in local if self.correction and (gain := self._gain(layer, name))}
        tally = Tally([space], gram, 1 + max(self.domains), self.device, gains, self.hidden[0].shape[-1])
        with observe(self._block(layer), local, lambda name, x: tally.see(local[name], x)):
            for index, batch in enumerate(self.batches):
                tally.batch = batch
                output = self._run(layer, index)
                if gains:
                    tally.settle(self.correction * (self.dense[index].float() - output.float()))
        return tally.of(space)

    def contributions(self, layer: int, space: Space) -> Tensor:
        """See `Passes.contributions`."""
        experts = self._experts(layer, str(space.experts))
        return contributions(experts, space.size, self._route(layer, experts), 1 + max(self.domains))

    def follow(self, layer: int, kinds: Collection[str]) -> None:
        """See `Passes.follow`; where nothing in the first block can correct, there is no correction in any."""
        if self.correction and layer == 0:
            spaces = [space for space in self.spec.at(0) if space.kind in kinds and space.experts is None]
            if not any(self._gain(0, self._local(0, axis)) for space in spaces for axis in space.into):
                self.correction = 0.0
        if self.correction:
            for index, hidden in enumerate(self.dense):
                self.dense[index] = self._run(layer, index, hidden)

    def advance(self, layer: int) -> None:
        """See `Passes.advance`."""
        self.routed = ()
        if layer + 1 == self.spec.num_blocks:
            return  # nothing reads what the last block gives
        for index in range(len(self.hidden)):
            self.hidden[index] = self._run(layer, index)

    def _block(self, layer: int) -> nn.Module:
        # Asked for anew each time, since a block is replaced when it shrinks.
        return block_list(self.model, self.spec)[layer]

    def _local(self, layer: int, axis: Axis) -> str:
        return axis.module.removeprefix(self.spec.block_prefix(layer))

    def _experts(self, layer: int, name: str) -> nn.Module:
        return self._block(layer).get_submodule(name.removeprefix(self.spec.block_prefix(layer)))

    def _route(self, layer: int, experts: nn.Module) -> tuple[Routed, ...]:
        return listen(experts, self.batches, lambda index: self._run(layer, index))

    @torch.no_grad()
    def _gain(self, layer: int, name: str) -> float:
        """What a module's output is multiplied by on its way into the block's output; 0 where it does not go straight.

        Noise on the output tells. It is as large as the stream, so that rounding does not hide it.
        """
        if name not in self.gains:
            index = min(range(len(self.hidden)), key=lambda index: len(self.hidden[index]))
            hidden = self.hidden[index]
            noise = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0)).to(hidden.device)
            noise *= hidden.float().std()
            plain = self._run(layer, index).float()
            with adding(self._block(layer).get_submodule(name), noise):
                moved = (self._run(layer, index).float() - plain).to(noise.device)
            gain = float((moved * noise).sum() / noise.square().sum())
            rest = float((moved - gain * noise).norm() / noise.norm())
            self.gains[name] = gain if rest < CROOKED * abs(gain) else 0.0
        return self.gains[name]

    @torch.no_grad()
    def _run(self, layer: int, index: int, hidden: Tensor | None = None) -> Tensor:
        """What block `layer` makes of one batch, or of other hidden states for it, in the block's own precision."""
        hidden = self.hidden[index] if hidden is None else hidden
        call = self.calls[len(hidden)][layer]
        block = self._block(layer)
        like = next(block.parameters())
        hidden, args, kwargs = send_to_device((hidden, call.args, call.kwargs), like.device)
        if like.dtype == torch.float32:
            hidden, args, kwargs = convert_to_fp32((hidden, args, kwargs))
        with self.clock.running(self.domains[index]):
            output = block(hidden_states=hidden, **kwargs) if call.by_name else block(hidden, *args, **kwargs)
        return first_of(output)


class ModelPasses:
    """The whole model at once: for architectures whose blocks hand on more than hidden states.

    Every tap is observed in the same pass, on the model as it stands when the round begins; experts take a pass of
    their own for each block.
    """

    def __init__(self, model: PreTrainedModel, spec: ArchSpec, batches: Sequence[Batch], clock: Clock | None = None):
        self.model, self.spec, self.batches = model, spec, batches
        self.clock = clock or Clock(next(model.parameters()).device)
        self.domains = [batch.domain for batch in batches]
        self.tally: Tally | None = None
        self.routed: tuple[str, tuple[Routed, ...]] = ("", ())

    def gather(self, layer: int, space: Space, gram: bool) -> list[list[Moments]]:
        """See `Passes.gather`."""
        if space.experts is not None:
            experts = self.model.get_submodule(space.experts)
            if self.routed[0] != space.experts:
                self.routed = space.experts, self._route(experts)
            return [finite(space, inner_moments(experts, space, self.routed[1], gram, 1 + max(self.domains)))]
        if self.tally is None:
            spaces = [other for other in self.spec.spaces if other.experts is None]
            self.tally = Tally(spaces, gram, 1 + max(self.domains), next(self.model.parameters()).device)
            with observe(self.model, self.tally.taps, self.tally.see):
                for index, batch in enumerate(self.batches):
                    self.tally.batch = batch
                    self._run(index)
        return self.tally.of(space)

    def contributions(self, layer: int, space: Space) -> Tensor:
        """See `Passes.contributions`."""
        experts = self.model.get_submodule(str(space.experts))
        return contributions(experts, space.size, self._route(experts), 1 + max(self.domains))

    def follow(self, layer: int, kinds: Collection[str]) -> None:
        """See `Passes.follow`; errors are not corrected here."""

    def advance(self, layer: int) -> None:
        """See `Passes.advance`."""

    def _route(self, experts: nn.Module) -> tuple[Routed, ...]:
        return listen(experts, self.batches, self._run)

    @torch.no_grad()
    def _run(self, index: int) -> None:
        base: Any = self.model.base_model
        with self.clock.running(self.domains[index]):
            run_model(base, self.batches[index].ids)


def passes_over(
    model: PreTrainedModel,
    spec: ArchSpec,
    batches: Sequence[Batch],
    clock: Clock | None = None,
    correction: float = 0.0,
) -> Passes:
    """Block by block where the model allows it, the whole model otherwise; see `BlockPasses` for the rest."""
    try:
        return BlockPasses(model, spec, batches, clock, correction)
    except NotSequentialError:
        return ModelPasses(model, spec, batches, clock)
