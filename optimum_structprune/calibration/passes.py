"""Runs the calibration samples through the model and gathers moments at the taps."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from ..arch.spec import ArchSpec, Space
from ..forward.calls import NotSequentialError
from ..forward.clock import Clock
from ..forward.hooks import observe
from ..forward.metrics import run_model
from .experts import Routed, contributions, inner_moments
from .moments import Moments
from .sequential import LayerPasses
from .tally import Batch, Tally, finite, listen


if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..domains.load import Domain


class Passes(Protocol):
    """Forward passes over the calibration samples, seen by one layer of the model after the other."""

    def gather(self, layer: int, space: Space, gram: bool) -> list[list[Moments]]:
        """Moments of the inputs of the space's consumers: for each consumer, one per domain."""
        ...

    def contributions(self, layer: int, space: Space) -> Tensor:
        """How much each expert of a space of whole experts contributes, shape `(domains, experts)`."""
        ...

    def follow(self, layer: int, kinds: Collection[str]) -> None:
        """Block `layer` has its dense weights; what corrects errors takes the dense stream through it.

        Args:
            layer: Index of the layer.
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
        for ids, mask in zip(domain.samples.split(batch_size), _masks(domain, batch_size), strict=True)
        if len(ids)
    ]


def _masks(domain: Domain, batch_size: int) -> Sequence[Tensor | None]:
    if domain.mask is None:
        return [None] * len(domain.samples.split(batch_size))
    return domain.mask.split(batch_size)


class ModelPasses:
    """The whole model at once: for architectures whose layers hand on more than hidden states.

    Every tap is observed in the same pass, on the model as it stands when the round begins; experts take a pass of
    their own for each layer.
    """

    def __init__(self, model: PreTrainedModel, arch: ArchSpec, batches: Sequence[Batch], clock: Clock | None = None):
        self.model, self.arch, self.batches = model, arch, batches
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
            spaces = [other for other in self.arch.spaces if other.experts is None]
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
    arch: ArchSpec,
    batches: Sequence[Batch],
    clock: Clock | None = None,
    error_feedback: float = 0.0,
) -> Passes:
    """Block by layer where the model allows it, the whole model otherwise; see `LayerPasses` for the rest."""
    try:
        return LayerPasses(model, arch, batches, clock, error_feedback)
    except NotSequentialError:
        return ModelPasses(model, arch, batches, clock)
