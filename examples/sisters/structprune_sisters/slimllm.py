"""SlimLLM: channels by the principal directions of the output, heads by how much the output still looks the same."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from optimum_structprune import register_criterion
from optimum_structprune.arch.spec import CHANNEL, ArchSpec, Axis, Space
from optimum_structprune.config.pruning import REFITS, StructPruneConfig
from optimum_structprune.criteria.obs_drive import norms_by_unit
from optimum_structprune.method.calibrate import Moments, submatrix
from optimum_structprune.method.layers import Batch
from optimum_structprune.system.processes import all_reduce_

from .watching import check_dense, of_samples, run_watched


def inflows(model: PreTrainedModel, arch: ArchSpec, batches: Sequence[Batch]) -> dict[str, Tensor]:
    """How strongly each channel is driven by what produces it: √Σ_i W_ji² E[x_i²], summed over its producers W.

    Returns:
        By module of the consumer, shape `(domains, n)`, fp64; zeros for what are not single channels.
    """
    check_dense(arch)
    channels = [space for space in arch.spaces if space.unit == CHANNEL]
    domains = 1 + max(batch.domain for batch in batches)
    squares: dict[str, Tensor] = {}
    counts = torch.zeros(domains, dtype=torch.float64)

    def see(batch: Batch, name: str, x: Tensor) -> None:
        sums = batch.counted(x).double().square().sum(0).cpu()
        squares.setdefault(name, torch.zeros(domains, len(sums), dtype=torch.float64))[batch.domain] += sums

    producers = sorted({axis.module for space in channels for axis in _matrices(model, space)})
    for batch in batches:
        counts[batch.domain] += batch.ids.numel() * batch.counts
    run_watched(model, producers, batches, see)
    all_reduce_([counts, *(squares[name] for name in producers)])
    means = {name: sums / counts.clamp(min=1)[:, None] for name, sums in squares.items()}
    found = {
        axis.module: torch.zeros(domains, space.size * axis.per_unit, dtype=torch.float64)
        for space in arch.spaces
        for axis in space.consumers
    }
    for space in channels:
        for axis in space.consumers:
            for producer in _matrices(model, space):
                found[axis.module] += norms_by_unit(model, space, producer, means[producer.module])
    return found


def _matrices(model: PreTrainedModel, space: Space) -> list[Axis]:
    return [axis for axis in space.producers if model.get_parameter(axis.param).ndim == 2]


def _check(config: StructPruneConfig, arch: ArchSpec, use: str) -> None:
    check_dense(arch)


@register_criterion(
    "slimllm",
    paper="SlimLLM, Guo et al. 2025, arXiv:2505.22689",
    needs_gram=True,
    whole_model_statistics=of_samples(inflows),
    check=_check,
)
def slimllm(weight: Tensor, moments: Moments, columns_per_unit: int) -> Tensor:
    """The scores of SlimLLM (Guo et al., ICML 2025, arXiv 2505.22689), as in its published code.

    A channel j scores I_d + I_g + I_u. I_d is ‖|W_:jᵀ V| · w‖ √E[x_j²], where V and λ are the eigenvectors and
    eigenvalues of the covariance of the consumer's output and w = sigmoid(λ / mean(λ)); I_g and I_u are
    √Σ_i W_ji² E[x_i²] of its two producers. The input of the producers is that of the model before the round.

    A KV group u of several columns, with the output o_u and the output T of all, scores -Σ_i |ρ(T_i - o_ui, T_i)|,
    with Pearson's ρ over tokens and i over the outputs. The published code has single heads, and exchanges them as
    long as the output of the kept ones comes nearer to T; here they are groups, which stay as they are chosen.
    The 1 % of channels with the lowest scores, which it keeps, go like others.
    """
    if columns_per_unit > 1:
        shares, between = _of_units(weight, moments, columns_per_unit)
        own, total = between.diagonal(dim1=1, dim2=2), shares.sum(1, keepdim=True)
        return -_similarity(total - shares, total - 2 * shares + own, total).abs().sum(0)
    assert moments.prior is not None
    mean = weight @ moments.mean.to(weight)
    covariance = (weight @ moments.full_gram().to(weight) @ weight.T).addr_(mean, mean, alpha=-1)
    values, directions = torch.linalg.eigh(covariance.double())
    importance = torch.sigmoid(values.abs() / values.abs().mean().clamp(min=torch.finfo(values.dtype).tiny))
    columns = ((directions.T @ weight.double()).abs() * importance[:, None]).norm(dim=0)
    return (columns * moments.square.to(columns).sqrt() + moments.prior.to(columns)).to(weight)


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


@REFITS.register("slope")
def slope_refit(
    weight: Tensor, bias: Tensor | None, moments: Moments, keep: Tensor, damping: float
) -> tuple[Tensor, Tensor | None]:
    """Scale every output by the slope of the regression of its dense values on its pruned ones.

    This is the regression of SlimLLM (Guo et al., ICML 2025, arXiv 2505.22689). Where the consumer has a bias, it
    takes the intercept; without one the line goes through zero, as the model has no place for an intercept. See
    `optimum_structprune.method.refit.least_squares` for the arguments.
    """
    gram, mean, kept = moments.full_gram().to(weight), moments.mean.to(weight), weight[:, keep]
    products = ((weight @ gram)[:, keep] * kept).sum(1)
    squares = ((kept @ submatrix(gram, keep, keep)) * kept).sum(1)
    dense, pruned = weight @ mean, kept @ mean[keep]
    if bias is not None:
        products, squares = products - dense * pruned, squares - pruned.square()
    slope = torch.where(squares > 0, products / squares, torch.ones_like(squares))
    return slope[:, None] * kept, None if bias is None else bias + dense - slope * pruned
