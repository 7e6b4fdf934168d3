"""Forward passes over the calibration samples, and the moments that they give."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..arch.load import layer_list
from ..arch.spec import ArchSpec, Space
from ..domains.domain import Domain
from ..forward.hooks import adding, observe, observe_products
from ..forward.layers import Batch, LayerRunner, NotSequentialError, equal, must_be_whole
from ..forward.metrics import run_model
from ..system.offloading import compute_device, is_offloaded
from ..system.processes import as_first_has_
from .accumulator import Accumulator, Norm, listen, normalised
from .cached import CachedOutputs
from .experts import Routed, contributions, inner_moments
from .moments import Moments


@dataclass(frozen=True)
class PassesState:
    """What passes have reached: hidden states by name, and numbers from earlier layers, as JSON takes them."""

    tensors: dict[str, Tensor]
    values: dict[str, Any]


class Passes(ABC):
    """Forward passes over the calibration samples, asked for by one layer of the model after the other.

    `saliency` is what a criterion that watches the whole model says of each component, by module, shape `(n,)`. A
    subclass that runs nothing between layers leaves `advance`, `advance_dense`, `state` and `resume_` as they are.
    """

    saliency: Mapping[str, Tensor] | None = None

    @abstractmethod
    def gather(self, layer: int, space: Space, gram: bool) -> Iterator[list[Moments]]:
        """Moments of the inputs of the space's consumers: one per consumer, of one domain after the other.

        A Gram matrix of a large model takes gigabytes, so those of a domain are to be let go before the next is asked
        for.
        """

    def contributions(self, layer: int, space: Space) -> Tensor:
        """How much each expert of a space of whole experts contributes, shape `(domains, experts)`."""
        raise NotImplementedError

    def advance_dense(self, layer: int, kinds: Collection[str]) -> None:
        """Take the dense residual stream through a layer that has its dense weights."""
        return

    def advance(self, layer: int) -> None:
        """Go on to the next layer; `layer` has its final weights for this step."""
        return

    def state(self) -> PassesState | None:
        """What the passes have reached; None where they cannot go on at a layer."""
        return None

    def resume_(self, state: PassesState) -> None:
        """Go on from what other passes over the same samples have reached."""
        return


# The largest share of a module's output that may reach the layer's output in another direction than its own.
MAX_DEVIATION = 0.1


class LayerPasses(LayerRunner, Passes):
    """One layer at a time, on stored inputs that have come through the layers already pruned.

    Memory: the hidden states of the calibration samples (twice with error feedback, or where layers are fixed) and the
    moments of one layer. Where a layer has experts, also what is routed to them, but the moments of only one expert.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        arch: ArchSpec,
        batches: Sequence[Batch],
        error_feedback: float = 0.0,
        fixed: bool = False,
    ):
        super().__init__(model, arch, batches)
        self.error_feedback, self.fixed = error_feedback, fixed
        self.given: dict[int, Tensor] = {}
        self.gains: dict[str, float | None] = {}
        # Whether error feedback goes through norms; for units inside the layers that brought next to nothing.
        self.through_norms = False
        self.norms: dict[tuple[int, str], Norm | None] = {}
        self.routed: tuple[Routed, ...] = ()
        self.num_domains = 1 + max(batch.domain for batch in batches)
        self.unchanged = CachedOutputs(torch.device("cpu") if is_offloaded(model) else None)
        self.dense_hidden = list(self.hidden)

    def gather(self, layer: int, space: Space, gram: bool) -> Iterator[list[Moments]]:
        """See `Passes.gather`."""
        if space.experts is not None:
            experts = self._module(layer, space.experts)
            # The experts of a layer read the same tokens, whichever of them is pruned first.
            self.routed = self.routed or self._route(layer, experts)
            yield from inner_moments(experts, space, self.routed, gram, self.num_domains)
            return
        self.routed = ()
        for domain in range(self.num_domains):
            yield self._accumulated(layer, space, gram, domain)

    def _accumulated(self, layer: int, space: Space, gram: bool, domain: int) -> list[Moments]:
        local = {self._local(layer, axis.module): axis.module for axis in space.into}
        ways = {local[name]: way for name in local if self.error_feedback and (way := self.way(layer, name))}
        accumulator = Accumulator([space], gram, domain, self.device, ways, self.hidden[0].shape[-1])
        module, index = self._layer(layer), 0
        pruned = [self._local(layer, axis.param) for axis in space.axes]
        with (
            observe_products(module, local, lambda name, *seen: accumulator.add(local[name], *seen)),
            nullcontext() if self.fixed else self.unchanged.recording(module, pruned, lambda: index),
        ):
            for index, batch in enumerate(self.batches):
                if batch.domain != domain:
                    continue
                accumulator.batch = batch
                output = self.output(layer, index)
                if self.fixed:
                    self.given[index] = output.to(self.hidden[index].device)
                if ways:
                    dense = self.dense_hidden[index].to(output.device)
                    accumulator.add_error(self.error_feedback * (dense.float() - output.float()))
        return accumulator.of(space)

    def contributions(self, layer: int, space: Space) -> Tensor:
        """See `Passes.contributions`."""
        experts = self._module(layer, str(space.experts))
        return contributions(experts, space.size, self._route(layer, experts), self.num_domains)

    def advance_dense(self, layer: int, kinds: Collection[str]) -> None:
        """See `Passes.advance_dense`; where no consumer of the first layer has a `way`, error feedback is off."""
        if self.error_feedback and layer == 0:
            spaces = [space for space in self.arch.at(0) if space.kind in kinds and space.experts is None]
            if not any(self.way(0, self._local(0, axis.module)) for space in spaces for axis in space.into):
                self.error_feedback = 0.0
        if self.error_feedback:
            for index, hidden in enumerate(self.dense_hidden):
                self.dense_hidden[index] = self.output(layer, index, hidden).to(hidden.device)

    def advance(self, layer: int) -> None:
        """See `Passes.advance`."""
        self.routed = ()
        if len(self.given) == len(self.hidden):
            self.hidden = [self.given[index] for index in range(len(self.hidden))]
        elif layer + 1 < self.arch.num_layers:  # nothing that prunes reads what the last layer gives
            self.pass_through(layer)
        self.given = {}
        self.unchanged.forget()

    def pass_through(self, layer: int) -> None:
        """See `LayerRunner.pass_through`; what runs before the pruned parts of the layer does not run again."""
        for index, hidden in enumerate(self.hidden):
            with self.unchanged.replayed(self._layer(layer), index, self._device(layer)):
                self.hidden[index] = self.output(layer, index).to(hidden.device)

    def state(self) -> PassesState:
        """See `Passes.state`."""
        tensors = {f"hidden.{index}": hidden for index, hidden in enumerate(self.hidden)}
        if self.error_feedback:
            tensors |= {f"dense.{index}": hidden for index, hidden in enumerate(self.dense_hidden)}
        return PassesState(tensors, {"gains": self.gains, "error_feedback": self.error_feedback})

    def resume_(self, state: PassesState) -> None:
        """See `Passes.resume_`."""
        for name, stored in (("hidden", self.hidden), ("dense", self.dense_hidden)):
            for index, before in enumerate(stored):
                stored[index] = state.tensors.get(f"{name}.{index}", before).to(before.device)
        self.gains, self.error_feedback = dict(state.values["gains"]), state.values["error_feedback"]

    def way(self, layer: int, name: str) -> float | Norm | None:
        """How a module's output comes into the layer's output: times a `gain`, through a norm, or otherwise (None)."""
        gain = self.gain(layer, name)
        if gain is not None or not self.through_norms:
            return gain
        if (layer, name) not in self.norms:
            self.norms[layer, name] = _norm_behind(self, layer, name)
        return self.norms[layer, name]

    @torch.no_grad()
    def gain(self, layer: int, name: str) -> float | None:
        """How much a module's output is multiplied by on its way into the layer's output: with noise n added to the
        module's output, the layer's output changes by g · n + r, and g is the gain where ‖r‖ is small beside ‖g · n‖.
        None where the output does not go straight into the residual stream.
        """
        if name not in self.gains:
            # Of the first sample alone, so that neither the batch size nor the number of processes changes the gain.
            hidden = self.hidden[0]
            noise = _noise(hidden)
            plain = self.output(layer, 0)[:1].float()
            with adding(self._layer(layer).get_submodule(name), noise.expand(hidden.shape)):
                change = (self.output(layer, 0)[:1].float() - plain).to(noise.device)
            gain = float(as_first_has_((change * noise).sum() / noise.square().sum()))
            deviation = float(as_first_has_((change - gain * noise).norm() / noise.norm()))
            self.gains[name] = gain if deviation < MAX_DEVIATION * abs(gain) else None
        return self.gains[name]

    def _route(self, layer: int, experts: nn.Module) -> tuple[Routed, ...]:
        return listen(experts, self.batches, lambda index: self.output(layer, index))


def _noise(hidden: Tensor) -> Tensor:
    """Noise for the first sample, as large as the residual stream, so that rounding does not hide it."""
    noise = torch.randn(hidden[:1].shape, generator=torch.Generator().manual_seed(0)).to(hidden.device)
    return noise * hidden[:1].float().std()


@torch.no_grad()
def _norm_behind(runner: LayerRunner, layer: int, name: str) -> Norm | None:
    """The norm that makes w · y / rms(y) of a module's output y and adds it to the residual stream, if there is one.

    What it makes of noise in the place of y is half of the difference to what it makes of its negative.
    """
    hidden, module = runner.hidden[0], layer_list(runner.model, runner.arch)[layer]
    vectors = [vector for vector, of in module.named_parameters() if of.shape == hidden.shape[-1:]]
    may = [vector.removesuffix(".weight") for vector in vectors if vector.endswith(".weight")]
    like = next(module.parameters())
    noise = _noise(hidden).expand(hidden.shape).to(like)
    outputs: list[Tensor] = []
    behind: list[str] = []

    def see(norm: str, x: Tensor) -> None:
        if x.numel() == given.numel() and equal(x.reshape(given.shape), given):
            behind.append(norm)

    for given in (noise, -noise):
        with adding(module.get_submodule(name), given, alone=True), observe(module, may, see):
            outputs.append(runner.output(layer, 0)[:1].float())
    change, unit = (outputs[0] - outputs[1]) / 2, normalised(noise[:1])
    weight = as_first_has_((change * unit).mean((0, 1)) / unit.square().mean((0, 1)))
    deviation = float(as_first_has_((change - weight * unit).norm() / change.norm()))
    if len(behind) != 2 or deviation > MAX_DEVIATION:
        return None
    return Norm(f"{runner.arch.layer_prefix(layer)}{behind[0]}", weight)


def batches_of(domains: Sequence[Domain], batch_size: int) -> list[Batch]:
    """The samples of every domain, cut into batches; no batch holds two domains."""
    return [
        Batch(index, domain.samples[part], None if domain.mask is None else domain.mask[part])
        for index, domain in enumerate(domains)
        for part in (slice(start, start + batch_size) for start in range(0, len(domain.samples), batch_size))
    ]


class ModelPasses(Passes):
    """The whole model at once: for architectures whose layers hand on more than hidden states.

    Every consumer is observed in the same pass, on the model as it stands when the step begins. Experts take a pass of
    their own for each layer.
    """

    def __init__(self, model: PreTrainedModel, arch: ArchSpec, batches: Sequence[Batch]):
        self.model, self.arch, self.batches = model, arch, batches
        self.num_domains = 1 + max(batch.domain for batch in batches)
        self.accumulators: list[Accumulator] = []
        self.routed: tuple[str, tuple[Routed, ...]] = ("", ())

    def gather(self, layer: int, space: Space, gram: bool) -> Iterator[list[Moments]]:
        """See `Passes.gather`; here the moments of all domains and layers are in memory."""
        if space.experts is not None:
            experts = self.model.get_submodule(space.experts)
            if self.routed[0] != space.experts:
                self.routed = space.experts, self._route(experts)
            yield from inner_moments(experts, space, self.routed[1], gram, self.num_domains)
            return
        if not self.accumulators:
            self.accumulators = self._accumulated(gram)
        for accumulator in self.accumulators:
            yield accumulator.of(space)

    def _accumulated(self, gram: bool) -> list[Accumulator]:
        spaces = [space for space in self.arch.spaces if space.experts is None]
        device = compute_device(self.model)
        accumulators = [Accumulator(spaces, gram, domain, device) for domain in range(self.num_domains)]
        present = accumulators[0]
        with observe_products(self.model, present.moments, lambda name, *seen: present.add(name, *seen)):
            for index, batch in enumerate(self.batches):
                present = accumulators[batch.domain]
                present.batch = batch
                self._run(index)
        return accumulators

    def contributions(self, layer: int, space: Space) -> Tensor:
        """See `Passes.contributions`."""
        experts = self.model.get_submodule(str(space.experts))
        return contributions(experts, space.size, self._route(experts), self.num_domains)

    def _route(self, experts: nn.Module) -> tuple[Routed, ...]:
        return listen(experts, self.batches, self._run)

    @torch.no_grad()
    def _run(self, index: int) -> None:
        base: Any = self.model.base_model
        run_model(base, self.batches[index].ids)


def passes_over(
    model: PreTrainedModel,
    arch: ArchSpec,
    batches: Sequence[Batch],
    error_feedback: float = 0.0,
    fixed: bool = False,
) -> Passes:
    """Passes layer by layer where the model allows it, over the whole model otherwise; see `LayerPasses`."""
    try:
        return LayerPasses(model, arch, batches, error_feedback, fixed)
    except NotSequentialError as error:
        if is_offloaded(model):
            raise must_be_whole(arch, error) from error
        return ModelPasses(model, arch, batches)
