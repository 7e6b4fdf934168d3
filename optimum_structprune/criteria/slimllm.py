"""SlimLLM: channels by the principal directions of the output, heads by how much the output still looks the same."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..calibration.moments import Moments
from .base import Criterion, register_criterion
from .whole import inflows


@register_criterion("slimllm")
class SlimLLM(Criterion):
    """The scores of SlimLLM (Guo et al., ICML 2025, arXiv 2505.22689), as in its published code.

    A channel j scores I_d + I_g + I_u. I_d is ‖|W_:jᵀ V| · w‖ √E[x_j²], where V and λ are the eigenvectors and
    eigenvalues of the covariance of the consumer's output and w = sigmoid(λ / mean(λ)); I_g and I_u are
    √Σ_i W_ji² E[x_i²] of its two producers. The input of the producers is that of the model before the round.

    A KV group u of several columns, with the output o_u and the output T of all, scores -Σ_i |ρ(T_i - o_ui, T_i)|,
    with Pearson's ρ over tokens and i over the outputs. Then groups are exchanged as long as the output of the kept
    ones comes nearer to T. The published code has single heads; groups of query heads that share a KV head are ours.
    The 1 % of channels with the lowest scores, which it keeps, go like others.
    """

    needs_gram = True
    watches = staticmethod(inflows)

    def score(self, weight: Tensor, moments: Moments, columns_per_unit: int) -> Tensor:
        """See `Criterion.score`."""
        if columns_per_unit > 1:
            shares, between = _of_units(weight, moments, columns_per_unit)
            own, total = between.diagonal(dim1=1, dim2=2), shares.sum(1, keepdim=True)
            return -_similarity(total - shares, total - 2 * shares + own, total).abs().sum(0)
        assert moments.saliency is not None
        mean = weight @ moments.mean.to(weight)
        covariance = (weight @ moments.full_gram().to(weight) @ weight.T).addr_(mean, mean, alpha=-1)
        values, directions = torch.linalg.eigh(covariance.double())
        importance = torch.sigmoid(values.abs() / values.abs().mean().clamp(min=torch.finfo(values.dtype).tiny))
        columns = ((directions.T @ weight.double()).abs() * importance[:, None]).norm(dim=0)
        return (columns * moments.square.to(columns).sqrt() + moments.saliency.to(columns)).to(weight)

    def exchanged(
        self, keep: tuple[int, ...], others: Sequence[int], weight: Tensor, moments: Moments, columns_per_unit: int
    ) -> tuple[int, ...]:
        """See `Criterion.exchanged`."""
        if columns_per_unit == 1 or not others:
            return keep
        shares, between = _of_units(weight, moments, columns_per_unit)
        total, own, kept, gone = shares.sum(1), between.diagonal(dim1=1, dim2=2), list(keep), list(others)
        best = _similarity(shares[:, kept].sum(1), between[:, kept][:, :, kept].sum((1, 2)), total).sum()
        # Every exchange brings the output nearer, so none comes back.
        while True:
            sums = between[:, kept].sum(1)
            products = shares[:, kept].sum(1)[:, None, None] - shares[:, kept, None] + shares[:, None, gone]
            squares = (
                sums[:, kept].sum(1)[:, None, None]
                + (own - 2 * sums)[:, kept, None]
                + (own + 2 * sums)[:, None, gone]
                - 2 * between[:, kept][:, :, gone]
            )
            found = _similarity(products, squares, total[:, None, None]).sum(0)
            nearest = int(found.argmax())
            if not float(found.flatten()[nearest]) > float(best) + 1e-6 * abs(float(best)):
                return tuple(sorted(kept))
            best, (i, j) = found.flatten()[nearest], divmod(nearest, len(gone))
            kept[i], gone[j] = gone[j], kept[i]


def _of_units(weight: Tensor, moments: Moments, columns_per_unit: int) -> tuple[Tensor, Tensor]:
    """Covariances of the outputs of units. `weight` has the shape `(out, units * columns_per_unit)`.

    Returns:
        With the output of all units, shape `(out, units)`, and with that of each unit, shape `(out, units, units)`.
    """
    gram, mean = moments.full_gram().to(weight), moments.mean.to(weight)
    shape = len(weight), -1, columns_per_unit
    by_unit = []
    for own in torch.arange(weight.shape[1], device=weight.device).split(columns_per_unit):
        covariances = gram[own].addr(mean[own], mean, alpha=-1)
        by_unit.append(((weight[:, own] @ covariances) * weight).view(shape).sum(2))
    between = torch.stack(by_unit, 1)
    return between.sum(2), between


def _similarity(products: Tensor, squares: Tensor, total: Tensor) -> Tensor:
    """Pearson's correlation of outputs with the output of all units."""
    scale = (squares.clamp(min=0) * total.clamp(min=0)).sqrt()
    return products / scale.clamp(min=torch.finfo(scale.dtype).tiny)
