"""Forward passes over the calibration samples, and the moments that they give."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..arch.spec import ArchSpec, Space
from ..domains.load import Domain
from ..errors import StructPruneError
from ..forward.calls import NotSequentialError
from ..forward.clock import Clock
from ..forward.hooks import observe_products
from ..forward.metrics import evaluating, run_model
from ..system.offloading import compute_device, is_offloaded
from .accumulator import Accumulator, Batch, finite, listen
from .base import Passes, PassesState
from .experts import Routed, contributions, inner_moments
from .moments import Moments
from .running import LayerRunner
from .sequential import LayerPasses


def batches_of(domains: Sequence[Domain], batch_size: int) -> list[Batch]:
    """The samples of every domain, cut into batches; no batch holds two domains."""
    return [
        Batch(index, ids, mask)
        for index, domain in enumerate(domains)
        for ids, mask in zip(domain.samples.split(batch_size), _masks(domain, batch_size), strict=True)
        if len(ids)
    ]


def _masks(domain: Domain, batch_size: int) -> Sequence[Tensor | None]:
    if domain.mask is None:
        return [None] * len(domain.samples.split(batch_size))
    return domain.mask.split(batch_size)


class ModelPasses(Passes):
    """The whole model at once: for architectures whose layers hand on more than hidden states.

    Every consumer is observed in the same pass, on the model as it stands when the step begins. Experts take a pass of
    their own for each layer.
    """

    def __init__(self, model: PreTrainedModel, arch: ArchSpec, batches: Sequence[Batch], clock: Clock | None = None):
        self.model, self.arch, self.batches = model, arch, batches
        self.clock = clock or Clock(compute_device(model))
        self.num_domains = 1 + max(batch.domain for batch in batches)
        self.accumulators: list[Accumulator] = []
        self.routed: tuple[str, tuple[Routed, ...]] = ("", ())

    def gather(self, layer: int, space: Space, gram: bool) -> Iterator[list[Moments]]:
        """See `Passes.gather`; here the moments of all domains and layers are in memory."""
        if space.experts is not None:
            experts = self.model.get_submodule(space.experts)
            if self.routed[0] != space.experts:
                self.routed = space.experts, self._route(experts)
            for domain, moments in enumerate(inner_moments(experts, space, self.routed[1], gram, self.num_domains)):
                yield [finite(space, moments, domain)]
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
        with self.clock.running(self.batches[index].domain):
            run_model(base, self.batches[index].ids)


class SaliencyPasses(Passes):
    """Passes whose moments also hold what passes through the whole model have said of every component. `saliency` has
    the shape `(domains, n)`.
    """

    def __init__(self, passes: Passes, saliency: Mapping[str, Tensor]):
        self.passes, self.saliency = passes, saliency

    def gather(self, layer: int, space: Space, gram: bool) -> Iterator[list[Moments]]:
        """See `Passes.gather`."""
        for domain, by_consumer in enumerate(self.passes.gather(layer, space, gram)):
            for axis, moments in zip(space.into, by_consumer, strict=True):
                moments.saliency = self.saliency[axis.module][domain]
            yield by_consumer

    def contributions(self, layer: int, space: Space) -> Tensor:
        """See `Passes.contributions`."""
        return self.passes.contributions(layer, space)

    def advance_dense(self, layer: int, kinds: Collection[str]) -> None:
        """See `Passes.advance_dense`."""
        self.passes.advance_dense(layer, kinds)

    def advance(self, layer: int) -> None:
        """See `Passes.advance`."""
        self.passes.advance(layer)

    def state(self) -> PassesState | None:
        """See `Passes.state`."""
        return self.passes.state()

    def resume_(self, state: PassesState) -> None:
        """See `Passes.resume_`."""
        self.passes.resume_(state)


def passes_over(
    model: PreTrainedModel,
    arch: ArchSpec,
    batches: Sequence[Batch],
    clock: Clock | None = None,
    error_feedback: float = 0.0,
    fixed: bool = False,
) -> Passes:
    """Passes layer by layer where the model allows it, over the whole model otherwise; see `LayerPasses`."""
    try:
        return LayerPasses(model, arch, batches, clock, error_feedback, fixed)
    except NotSequentialError as error:
        if is_offloaded(model):
            raise _must_be_whole(arch, error) from error
        return ModelPasses(model, arch, batches, clock)


def check_sequential(model: PreTrainedModel, arch: ArchSpec) -> None:
    """Refuse a model whose layers cannot run one by one, which an offloaded one has to."""
    if model.main_input_name != "input_ids":
        return
    texts = [torch.tensor([row]) for row in ((0, 1, 2, 3), (3, 2, 1, 0))]
    try:
        with evaluating(model):
            LayerRunner(model, arch, [Batch(0, ids) for ids in texts])
    except NotSequentialError as error:
        raise _must_be_whole(arch, error) from error


def _must_be_whole(arch: ArchSpec, error: NotSequentialError) -> StructPruneError:
    return StructPruneError(
        f"{error}, so the layers cannot be brought in one by one; load the {arch.model_type} model in memory, or over "
        "several devices."
    )
