"""From the moments of several domains to one set of moments."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..arch.spec import Space
from .moments import Moments, WeightedMean
from .passes import Passes


# The number of rows of a matrix product that are in memory at a time.
ROWS = 256


@dataclass(frozen=True)
class Mixture:
    """The weights of the domains, which sum to 1."""

    shares: tuple[float, ...]

    def pool(self, weight: Tensor, moments_by_domain: Iterable[Moments]) -> Moments:
        """The moments of the mixture at a consumer whose weight has the shape `(out, n)`; see `Pool`."""
        pool = Pool(self, weight)
        for moments in moments_by_domain:
            pool.add(moments)
        return pool.result()

    def combined(self, contributions: Tensor) -> Tensor:
        """One score per unit, shape `(units,)`, from what it contributes in each domain, shape `(domains, units)`:
        each domain is divided by its mean, so that one with large activations does not outweigh the others.
        """
        size = contributions.abs().mean(1, keepdim=True).clamp(min=torch.finfo(contributions.dtype).tiny)
        return self.mean(contributions / size)

    def mean(self, by_domain: Tensor) -> Tensor:
        """The mean over the domains by their weights, shape `(...)`, of values of shape `(domains, ...)`."""
        return torch.tensordot(by_domain.new_tensor(self.shares), by_domain, 1)


class Pool:
    """Brings the moments of one consumer together, of one domain after the other; in memory are those of the mixture
    and of the present domain. Each domain is divided by its output energy, so that one with large activations does not
    outweigh the others. `weight` has the shape `(out, n)`.
    """

    def __init__(self, mixture: Mixture, weight: Tensor):
        self.mixture, self.weight = mixture, weight
        self._shares = iter(mixture.shares)
        self._mean, self._energy = WeightedMean(), 0.0
        # Whether any domain had tokens, and outputs other than zero.
        self._evidence = (False, False)

    def add(self, moments: Moments, take: bool = False) -> None:
        """Take in the next domain."""
        share, energy = next(self._shares), output_energy(self.weight, moments)
        # Not every expert gets tokens of every domain, and a domain without output needs no unit: such a domain counts
        # only where no other domain gives more evidence.
        evidence = (moments.count > 0, energy > 0)
        if evidence > self._evidence:
            self._mean, self._energy, self._evidence = WeightedMean(), energy, evidence
        if evidence == self._evidence:
            self._mean.add(moments, share * self._energy / energy if energy > 0 else share, take)

    def result(self) -> Moments:
        """The moments over all domains, to be called once, after the last `add`."""
        return self._mean.moments()


def pooled(passes: Passes, space: Space, gram: bool, pools: Sequence[Pool]) -> list[Moments]:
    """The moments of the consumers of a space over all domains."""
    for by_consumer in passes.gather(space.layer, space, gram):
        for pool, moments in zip(pools, by_consumer, strict=True):
            pool.add(moments, take=True)
    gathered = [pool.result() for pool in pools]
    if passes.saliency is not None:
        for axis, moments in zip(space.into, gathered, strict=True):
            moments.saliency = passes.saliency[axis.module]
    return gathered


def output_energy(weight: Tensor, moments: Moments) -> float:
    """E‖W x‖² of a consumer: what was seen of its outputs; else from the Gram matrix, or without one from the second
    moments alone (as if components were uncorrelated). `weight` has the shape `(out, n)`.
    """
    if moments.energy is not None:
        return float(moments.energy)
    if moments.gram is None:
        return float(weight.square().sum(0) @ moments.square.to(weight))
    # tr(W H Wᵀ) = ⟨W H, W⟩, a few rows of W at a time.
    parts = [((rows @ moments.gram.to(rows)) * rows).sum(dtype=torch.float64) for rows in weight.split(ROWS)]
    return float(torch.stack(parts).sum())
