"""Compute activations with the whole model, for models whose layers pass on more than hidden states."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..arch.hooks import observe_products
from ..arch.inference import outputs_for, run_model
from ..arch.spec import ArchSpec, Space
from .calibrate import Moments
from .layers import Batch, Source
from .shrink import check_same


class WholeModel(Source):
    """A source that observes all consumers in one pass over the current model.

    The moments of all layers are in memory at the same time.
    """

    error_feedback = 0.0

    def __init__(self, model: PreTrainedModel, arch: ArchSpec, batches: Sequence[Batch]):
        self.model = model
        self.arch = arch
        self.batches = list(batches)
        self.num_domains = 1 + max(batch.domain for batch in batches)
        # The moments of each domain, by module.
        self._moments: list[dict[str, Moments]] = []

    @contextmanager
    def same_outputs(self, layer: int) -> Iterator[None]:
        """Raise if the outputs of the whole model change inside `with`."""
        outputs = outputs_for(self.model)
        yield
        check_same(f"The model with layer {layer} cut", outputs, outputs_for(self.model))

    def moments(self, layer: int, space: Space, gram: bool) -> Iterator[list[Moments]]:
        """Yield the moments of a space's consumers by domain. The first call runs all batches."""
        if space.experts is not None and self.expert_moments is not None:
            yield from self.expert_moments(self, space, gram)
            return

        if not self._moments:
            self._gather(gram)

        modules = [axis.module for axis in space.consumers]
        for domain, by_module in enumerate(self._moments):
            yield [self.ranks.sum_(by_module[module]).checked(module, domain) for module in modules]

    def _gather(self, gram: bool) -> None:
        """Run all batches, and update the moments of all consumers outside of experts."""
        sizes = {}
        for space in self.arch.spaces:
            if space.experts is None:
                sizes.update({axis.module: space.size * axis.per_unit for axis in space.consumers})

        for _ in range(self.num_domains):
            by_module = {}
            for module, size in sizes.items():
                # A model may be spread over several devices.
                device = next(self.model.get_submodule(module).parameters()).device
                by_module[module] = Moments.empty(size, gram, device)
            self._moments.append(by_module)

        batch = self.batches[0]

        def see(module: str, x: Tensor, product: Tensor | None) -> None:
            if product is not None:
                product = batch.counted(product)
            self._moments[batch.domain][module].update(batch.counted(x), output=product)

        with observe_products(self.model, sizes, see):
            for index, batch in enumerate(self.batches):  # noqa: B007  # `see` uses the batch
                self.output(0, index)

    @torch.no_grad()
    def output(self, layer: int, index: int) -> None:
        """Run one batch."""
        base: Any = self.model.base_model
        run_model(base, self.batches[index].ids)
