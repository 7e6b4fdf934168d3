"""From the evidence of several domains to one set of moments and one score per unit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..calibration.moments import Blend, Moments
from .aggregate import aggregate, normalised
from .base import per_unit


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

    def pool(self, weight: Tensor, moments_by_domain: Iterable[Moments]) -> Moments:
        """The moments of the domain mixture.

        Each domain is divided by its output energy, so that one with large activations does not outweigh the others.
        `weight` has the shape `(out, n)`.
        """
        return Pool(self, weight).through(moments_by_domain).moments

    def scores(
        self, criterion: Criterion, weight: Tensor, moments_by_domain: Iterable[Moments], columns_per_unit: int
    ) -> Tensor:
        """One score per unit from all domains.

        The mean of energies is taken over moments, so that the criterion sees correlations over all domains. Every
        other combination scores each domain by itself. `weight` has the shape `(out, units * columns_per_unit)`.

        Returns:
            The scores, shape `(units,)`, higher = keep.
        """
        return Pool(self, weight, Scoring(criterion, weight, columns_per_unit)).through(moments_by_domain).scores

    @property
    def pools_scores(self) -> bool:
        """Whether units are scored once, by the moments of the mixture, and not by each domain alone."""
        return self.aggregation == "mean" and self.normalisation in ("none", "energy")

    def combined(self, contributions: Tensor) -> Tensor:
        """One score per unit from its contributions in every domain. `contributions` has the shape `(domains, units)`.

        Returns:
            The scores, shape `(units,)`, higher = keep.
        """
        return self.together(contributions, self.shares)

    def together(self, scores: Tensor, shares: Sequence[float]) -> Tensor:
        """One score per unit from those of each domain, shape `(domains, units)`, and the weights of the domains."""
        on_one_scale = normalised(scores, self.normalisation)
        return aggregate(on_one_scale, shares, self.aggregation)


@dataclass(frozen=True)
class Scoring:
    """How the units of a consumer are scored.

    Attributes:
        criterion: The criterion.
        weight: The present weight of the consumer, shape `(out, units * columns_per_unit)`, fp32.
        columns_per_unit: The number of columns that a unit owns.
        columns: The columns of the dense consumer that are left; None where all are.
        drive: How strongly each column of the dense consumer is driven, see `calibration.drive.drive`, shape `(n,)`;
            it stands for the saliency of the moments. None where the criterion does not ask for it, or nothing drives
            single columns.
    """

    criterion: Criterion
    weight: Tensor
    columns_per_unit: int
    columns: Tensor | None = None
    drive: Tensor | None = None

    def of(self, moments: Moments) -> Tensor:
        """The scores by these moments of the dense consumer's input, shape `(units,)`, higher = keep."""
        moments = replace(moments, saliency=self.drive) if self.criterion.needs_drive else moments
        left = moments if self.columns is None else moments.select(self.columns)
        return self.criterion.score(self.weight, left, self.columns_per_unit)

    def carried(self, moments: Moments) -> Tensor:
        """How much output each unit carries by these moments, Σ_j ‖W_:j‖² E[x_j²] over its columns j; `(units,)`."""
        square = moments.square if self.columns is None else moments.square[self.columns.to(moments.square.device)]
        return per_unit(square.to(self.weight) * self.weight.square().sum(0), self.columns_per_unit)


class Pooled:
    """What all domains say of one consumer. `carried` has the shape `(domains, units)`."""

    def __init__(self, moments: Moments, score: Callable[[Moments], Tensor], carried: Tensor | None = None):
        self.moments, self.carried = moments, carried
        self._score = score

    @property
    def scores(self) -> Tensor:
        """One score per unit, shape `(units,)`, higher = keep; nothing where the units are not scored."""
        found = self._score(self.moments)
        self._score = lambda moments: found  # the first one held a copy of the weight
        return found


class Pool:
    """Brings the moments of one consumer together, of one domain after the other.

    In memory are the moments of the mixture, and those of the present domain, however many domains there are. `weight`
    has the shape `(out, n)`.
    """

    def __init__(self, mixture: Mixture, weight: Tensor, scoring: Scoring | None = None):
        self.mixture, self.weight, self.scoring = mixture, weight, scoring
        self._blend, self._shares = Blend(), iter(mixture.shares)
        self._scores: list[Tensor] = []
        self._seen: list[float] = []
        self._carried: list[Tensor] = []
        # The output energy of the first domain, and whether tokens and outputs other than zero have come in.
        self._first, self._tokens, self._loud = 0.0, False, False

    def add(self, moments: Moments, take: bool = False) -> None:
        """Take in the next domain."""
        share = next(self._shares)
        if self.scoring is not None and moments.count:
            self._carried.append(self.scoring.carried(moments))
        energy = 0.0 if self.mixture.normalisation == "none" else output_energy(self.weight, moments)
        self._start_anew(bool(moments.count), energy > 0)
        # Not every expert gets tokens of every domain, and a domain without output asks for nothing to be kept.
        if bool(moments.count) < self._tokens or (energy > 0) < self._loud:
            return
        self._first = self._first or energy
        if self.scoring is not None and not self.mixture.pools_scores:
            self._scores.append(self.scoring.of(moments))
            self._seen.append(share)
        self._blend.add(moments, share * self._first / energy if self._loud else share, share, take)

    def through(self, moments_by_domain: Iterable[Moments]) -> Pooled:
        """What all domains say together, from moments that stay as they are."""
        for moments in moments_by_domain:
            self.add(moments)
        return self.result()

    def result(self) -> Pooled:
        """What the domains say together; it can be asked for once, after the last of them."""
        moments = self._blend.moments()
        if self.scoring is None:
            nothing = self.weight.new_zeros(0)
            return Pooled(moments, lambda moments: nothing)
        if self.mixture.pools_scores:
            return Pooled(moments, self.scoring.of, self._all_carried())
        total = sum(self._seen)
        scores = self.mixture.together(torch.stack(self._scores), [share / total for share in self._seen])
        return Pooled(moments, lambda moments: scores, self._all_carried())

    def _all_carried(self) -> Tensor | None:
        return torch.stack(self._carried) if len(self._carried) == len(self.mixture.shares) else None

    def _start_anew(self, tokens: bool, loud: bool) -> None:
        """Forget the domains so far where the next one has what none of them had: tokens, or an output."""
        if tokens > self._tokens or (tokens == self._tokens and loud > self._loud):
            self._blend, self._scores, self._seen, self._first = Blend(), [], [], 0.0
            self._tokens, self._loud = tokens, loud


def pooled(by_domain: Iterable[list[Moments]], pools: Sequence[Pool]) -> list[Pooled]:
    """What all domains say of several consumers."""
    for by_consumer in by_domain:
        for pool, moments in zip(pools, by_consumer, strict=True):
            pool.add(moments, take=True)
    return [pool.result() for pool in pools]


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
