"""A source of activations for models whose layers pass on more than hidden states: it runs the whole model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..arch.hooks import observe_products
from ..arch.inference import run_model
from ..arch.spec import ArchSpec, Space
from ..forward.metrics import outputs_for
from ..method.calibrate import Moments
from ..method.layers import Batch, Source
from ..method.shrink import check_same


class WholeModel(Source):
    """Observes all consumers in one pass over the present model. The moments of all layers are in memory."""

    error_feedback = 0.0

    def __init__(self, model: PreTrainedModel, arch: ArchSpec, batches: Sequence[Batch]):
        self.model, self.arch, self.batches = model, arch, list(batches)
        self.num_domains = 1 + max(batch.domain for batch in batches)
        self.gathered: list[dict[str, Moments]] = []  # the moments of each domain, by module

    @contextmanager
    def same_outputs(self, layer: int) -> Iterator[None]:
        before = outputs_for(self.model)
        yield
        check_same(f"The model with layer {layer} cut", before, outputs_for(self.model))

    def moments(self, layer: int, space: Space, gram: bool) -> Iterator[list[Moments]]:
        if space.experts is not None and self.expert_moments is not None:
            yield from self.expert_moments(self, space, gram)
            return
        if not self.gathered:
            self._gather(gram)

        modules = [axis.module for axis in space.consumers]
        for domain, by_module in enumerate(self.gathered):
            yield [self.ranks.sum_(by_module[module]).checked(module, domain) for module in modules]

    def _gather(self, gram: bool) -> None:
        """Run all batches, and take the inputs of all consumers outside of experts into their moments."""
        sizes = {}
        for space in self.arch.spaces:
            if space.experts is None:
                sizes.update({axis.module: space.size * axis.per_unit for axis in space.consumers})

        for _ in range(self.num_domains):
            by_module = {}
            for module, size in sizes.items():
                # A spread model computes each module on its own device.
                device = next(self.model.get_submodule(module).parameters()).device
                by_module[module] = Moments.empty(size, gram, device)
            self.gathered.append(by_module)
        batch = self.batches[0]

        def see(module: str, x: Tensor, product: Tensor | None) -> None:
            output = None if product is None else batch.counted(product)
            self.gathered[batch.domain][module].update(batch.counted(x), output=output)

        with observe_products(self.model, sizes, see):
            for index, batch in enumerate(self.batches):  # noqa: B007  # `see` reads it
                self.output(0, index)

    @torch.no_grad()
    def output(self, layer: int, index: int) -> None:
        """Run one batch."""
        base: Any = self.model.base_model
        run_model(base, self.batches[index].ids)
