"""From the evidence of several domains to one set of moments and one score per unit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .stats import Moments, mix


if TYPE_CHECKING:
    from ..criteria.base import Criterion


def output_energy(weight: Tensor, moments: Moments) -> float:
    """E‖W x‖², from the Gram matrix, or without it from the squares alone (as if components were uncorrelated)."""
    if moments.gram is None:
        return float(weight.square().sum(0) @ moments.square.to(weight))
    return float(((weight @ moments.gram.to(weight)) * weight).sum())


def pool(weight: Tensor, parts: Sequence[Moments], shares: Sequence[float]) -> Moments:
    """Moments of the domain mixture, each domain divided by its output energy, so that a loud one does not drown the
    others.

    Args:
        weight: The dense consumer, shape `(out, n)`.
        parts: Moments of its input, one per domain.
        shares: Weight of each domain.
    """
    parts, shares = _seen(parts, shares)
    energies = [output_energy(weight, part) for part in parts]
    if min(energies) <= 0:
        return mix(parts, shares)
    return mix(parts, [share / energy for share, energy in zip(shares, energies, strict=True)])


def judge(
    criterion: Criterion,
    weight: Tensor,
    parts: Sequence[Moments],
    shares: Sequence[float],
    block: int,
    aggregation: str,
) -> Tensor:
    """One score per unit from all domains.

    `mean` scores the pooled moments; `max` scores each domain by itself, on one scale, and lets the domain speak that
    needs a unit most.
    """
    if aggregation == "mean":
        return criterion.score(weight, pool(weight, parts, shares), block)
    scores = torch.stack([criterion.score(weight, part, block) for part in _seen(parts, shares)[0]])
    return loudest(scores)


def judge_experts(contributions: Tensor, shares: Sequence[float], aggregation: str) -> Tensor:
    """One score per expert from its contributions in every domain, shape `(domains, experts)`, on one scale."""
    if aggregation == "max":
        return loudest(contributions)
    weights = torch.tensor(shares, dtype=contributions.dtype)
    means = contributions.mean(1).clamp(min=torch.finfo(contributions.dtype).tiny)
    return (weights / means) @ contributions


def loudest(scores: Tensor) -> Tensor:
    """The highest score of each unit over the domains, shape `(domains, units)`, each divided by its mean."""
    return (scores / scores.mean(1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)).amax(0)


def _seen(parts: Sequence[Moments], shares: Sequence[float]) -> tuple[Sequence[Moments], Sequence[float]]:
    """Without the domains that never came here; all of them where none did."""
    pairs = [(part, share) for part, share in zip(parts, shares, strict=True) if part.count]
    if not pairs:
        return parts, shares
    return [part for part, _ in pairs], [share for _, share in pairs]
