"""From the evidence of several domains to one set of moments and one score per unit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..calibration.moments import Moments, mix
from .aggregate import aggregate, normalised


if TYPE_CHECKING:
    from .base import Criterion


# Rows of a product of matrices that are in memory at once.
ROWS = 256


@dataclass
class Mixture:
    """How the evidence of the domains is brought together.

    Attributes:
        shares: Weight of each domain; they sum to 1.
        normalisation: What puts domains on one scale; see `calibration.aggregate.normalised`. Moments know only
            `none` and, for all others, `energy`.
        aggregation: How scores become one; see `calibration.aggregate`.
        quantile: For the aggregation `quantile`.
    """

    shares: tuple[float, ...]
    normalisation: str = "energy"
    aggregation: str = "mean"
    quantile: float = 0.75

    def pool(self, weight: Tensor, parts: Sequence[Moments]) -> Moments:
        """Moments of the domain mixture, each domain divided by its output energy, so that a loud one does not drown
        the others.

        Args:
            weight: The dense consumer, shape `(out, n)`.
            parts: Moments of its input, one per domain.
        """
        parts, shares = self._seen(parts)
        return mix(parts, self._weights(weight, parts, shares))

    def _weights(self, weight: Tensor, parts: Sequence[Moments], shares: Sequence[float]) -> Sequence[float]:
        energies = output_energies(weight, parts)
        if self.normalisation == "none" or min(energies) <= 0:
            return shares
        return [share / energy for share, energy in zip(shares, energies, strict=True)]

    def scores(self, criterion: Criterion, weight: Tensor, parts: Sequence[Moments], columns_per_unit: int) -> Tensor:
        """One score per unit from all domains.

        The mean of energies is taken over moments, which sees what domains have in common; every other way scores each
        domain by itself.

        Args:
            criterion: Scores units.
            weight: The consumer, shape `(out, units * columns_per_unit)`.
            parts: Moments of its input, one per domain.
            columns_per_unit: Columns per unit.
        """
        parts, shares = self._seen(parts)
        if self.aggregation == "mean" and self.normalisation in ("none", "energy"):
            # A loss has the same scale in every domain, so what it says of a unit needs none.
            weights = shares if parts[0].saliency is not None else self._weights(weight, parts, shares)
            # What no criterion reads is not mixed.
            parts = [replace(part, gram=part.gram if criterion.needs_gram else None, error=None) for part in parts]
            return criterion.score(weight, mix(parts, weights), columns_per_unit)
        scores = torch.stack([criterion.score(weight, part, columns_per_unit) for part in parts])
        return self._together(scores, shares)

    def combined(self, contributions: Tensor) -> Tensor:
        """One score per expert from its contributions in every domain, shape `(domains, experts)`."""
        return self._together(contributions, self.shares)

    def _together(self, scores: Tensor, shares: Sequence[float]) -> Tensor:
        scale = normalised(scores, self.normalisation)
        return aggregate(scale, shares, self.aggregation, self.quantile)

    def _seen(self, parts: Sequence[Moments]) -> tuple[Sequence[Moments], Sequence[float]]:
        """Without the domains that never came here; all of them where none did."""
        pairs = [(part, share) for part, share in zip(parts, self.shares, strict=True) if part.count]
        if not pairs:
            return parts, self.shares
        total = sum(share for _, share in pairs)
        return [part for part, _ in pairs], [share / total for _, share in pairs]


def output_energies(weight: Tensor, parts: Sequence[Moments]) -> list[float]:
    """E‖W x‖² by domain, from the Gram matrices, or without them from the squares alone (as if components were
    uncorrelated).
    """
    if parts[0].gram is None:
        squares = weight.square().sum(0)
        return [float(squares @ part.square.to(weight)) for part in parts]
    # tr(W H Wᵀ) = ⟨Wᵀ W, H⟩: the large product once for all domains, and never whole in memory.
    energies = torch.zeros(len(parts), dtype=torch.float64, device=weight.device)
    for rows in torch.arange(weight.shape[1], device=weight.device).split(ROWS):
        product = weight[:, rows].T @ weight
        for index, part in enumerate(parts):
            energies[index] += (product * part.full_gram()[rows].to(weight)).sum()
    return energies.tolist()
