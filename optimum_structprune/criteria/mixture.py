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


# The number of rows of a matrix product that are in memory at a time.
ROWS = 256


@dataclass
class Mixture:
    """How the moments and scores of several domains are combined.

    Attributes:
        shares: The weight of each domain; the weights sum to 1.
        normalisation: How domains are put on one scale; see `criteria.aggregate.normalised`. Moments are left as they
            are by `none` and divided by the output energy of their domain by all others.
        aggregation: How the scores of several domains become one; see `criteria.aggregate`.
    """

    shares: tuple[float, ...]
    normalisation: str = "energy"
    aggregation: str = "mean"

    def pool(self, weight: Tensor, moments_by_domain: Sequence[Moments]) -> Moments:
        """The moments of the domain mixture.

        Each domain is divided by its output energy, so that one with large activations does not outweigh the others.

        Args:
            weight: The weight of the dense consumer, shape `(out, n)`.
            moments_by_domain: The moments of its input, one per domain.
        """
        moments_by_domain, shares = self._seen(moments_by_domain)
        return mix(moments_by_domain, self._weights(weight, moments_by_domain, shares))

    def _weights(
        self, weight: Tensor, moments_by_domain: Sequence[Moments], shares: Sequence[float]
    ) -> Sequence[float]:
        energies = output_energies(weight, moments_by_domain)
        if self.normalisation == "none" or min(energies) <= 0:
            return shares
        return [share / energy for share, energy in zip(shares, energies, strict=True)]

    def scores(
        self, criterion: Criterion, weight: Tensor, moments_by_domain: Sequence[Moments], columns_per_unit: int
    ) -> Tensor:
        """One score per unit from all domains.

        The mean of energies is taken over moments, so that the criterion sees correlations over all domains. Every
        other combination scores each domain by itself.

        Args:
            criterion: The criterion that scores the units.
            weight: The weight of the consumer, shape `(out, units * columns_per_unit)`.
            moments_by_domain: The moments of its input, one per domain.
            columns_per_unit: The number of columns that a unit owns.

        Returns:
            The scores, shape `(units,)`, higher = keep.
        """
        moments_by_domain, shares = self._seen(moments_by_domain)
        if self.aggregation == "mean" and self.normalisation in ("none", "energy"):
            # The loss has the same scale in every domain, so its saliencies need no normalisation.
            by_loss = moments_by_domain[0].saliency is not None
            weights = shares if by_loss else self._weights(weight, moments_by_domain, shares)
            # Mixing Gram matrices takes long, and no criterion reads the error.
            read = [
                replace(moments, gram=moments.gram if criterion.needs_gram else None, error=None)
                for moments in moments_by_domain
            ]
            return criterion.score(weight, mix(read, weights), columns_per_unit)
        scores = torch.stack([criterion.score(weight, moments, columns_per_unit) for moments in moments_by_domain])
        return self._together(scores, shares)

    def combined(self, contributions: Tensor) -> Tensor:
        """One score per unit from its contributions in every domain.

        Args:
            contributions: The contributions of units such as experts or layers, shape `(domains, units)`.

        Returns:
            The scores, shape `(units,)`, higher = keep.
        """
        return self._together(contributions, self.shares)

    def _together(self, scores: Tensor, shares: Sequence[float]) -> Tensor:
        on_one_scale = normalised(scores, self.normalisation)
        return aggregate(on_one_scale, shares, self.aggregation)

    def _seen(self, moments_by_domain: Sequence[Moments]) -> tuple[Sequence[Moments], Sequence[float]]:
        """The moments and shares of the domains that had tokens here, as not every expert does; all where none had."""
        seen = [
            (moments, share) for moments, share in zip(moments_by_domain, self.shares, strict=True) if moments.count
        ]
        if not seen:
            return moments_by_domain, self.shares
        total = sum(share for _, share in seen)
        return [moments for moments, _ in seen], [share / total for _, share in seen]


def output_energies(weight: Tensor, moments_by_domain: Sequence[Moments]) -> list[float]:
    """E‖W x‖² by domain, from the Gram matrices, or without them from the second moments alone (as if components were
    uncorrelated).

    Args:
        weight: The weight W of a consumer, shape `(out, n)`.
        moments_by_domain: The moments of its input x, one per domain.
    """
    if moments_by_domain[0].gram is None:
        squares = weight.square().sum(0)
        return [float(squares @ moments.square.to(weight)) for moments in moments_by_domain]
    # tr(W H Wᵀ) = ⟨Wᵀ W, H⟩: the large product is computed once for all domains, and a few rows at a time.
    energies = torch.zeros(len(moments_by_domain), dtype=torch.float64, device=weight.device)
    for rows in torch.arange(weight.shape[1], device=weight.device).split(ROWS):
        product = weight[:, rows].T @ weight
        for index, moments in enumerate(moments_by_domain):
            energies[index] += (product * moments.full_gram()[rows].to(weight)).sum()
    return energies.tolist()
