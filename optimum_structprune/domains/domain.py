"""A calibration domain that has been read."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..config.domains import DomainConfig
from .packing import Packed


@dataclass(frozen=True)
class Domain:
    """A calibration domain as token ids, shape `(samples, seq_length)`: those that calibrate, with a `mask` of the
    tokens that give evidence, those that are held out for the report, `spare` ones for rounds in which the domain
    counts more, and the `probe`, which choices are made on. Documents are hashes, and each has one use, in all
    domains. The weights of all domains sum to 1, and `origin` is None for inputs that were given.
    """

    name: str
    weight: float
    samples: Tensor
    heldout: Tensor
    mask: Tensor | None = None
    origin: DomainConfig | None = None
    documents: tuple[str, ...] = ()
    heldout_documents: tuple[str, ...] = ()
    spare: Packed | None = None
    probe: Tensor | None = None
    probe_documents: tuple[str, ...] = ()

    @property
    def trial(self) -> Tensor:
        """The samples that a choice is made on, or a round is watched by, shape `(samples, seq_length)`."""
        return self.heldout if self.probe is None else self.probe

    @property
    def pool(self) -> Tensor:
        """All samples that a round may use, the spare ones included, shape `(samples, seq_length)`."""
        return self.samples if self.spare is None else torch.cat([self.samples, self.spare.samples])

    def portion(self, count: int) -> Domain:
        """The same domain with the first `count` samples of the pool, or all of them where there are fewer."""
        mask = self.mask
        if self.spare is not None and mask is not None and self.spare.mask is not None:
            mask = torch.cat([mask, self.spare.mask])
        return replace(self, samples=self.pool[:count], mask=None if mask is None else mask[:count])
