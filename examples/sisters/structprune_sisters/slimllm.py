"""SlimLLM, which scores channels in the principal directions of the output, and KV groups by correlations."""

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
    """Return √Σ_i W_ji² E[x_i²] of each channel j, summed over its producers W, whose input is x.

    Returns:
        By module of the consumer, shape `(domains, n)`, fp64. Units that are not single channels have zeros.
    """
    check_dense(arch)
    channel_spaces = [space for space in arch.spaces if space.unit == CHANNEL]
    producers: set[str] = set()
    for space in channel_spaces:
        producers.update(axis.module for axis in _matrices(model, space))

    mean_squares = _mean_squares(model, sorted(producers), batches)
    num_domains = 1 + max(batch.domain for batch in batches)
    norms: dict[str, Tensor] = {}
    for space in arch.spaces:
        for axis in space.consumers:
            norms[axis.module] = torch.zeros(num_domains, space.size * axis.per_unit, dtype=torch.float64)

    for space in channel_spaces:
        for axis in space.consumers:
            for producer in _matrices(model, space):
                norms[axis.module] += norms_by_unit(model, space, producer, mean_squares[producer.module])
    return norms


def _mean_squares(model: PreTrainedModel, modules: Sequence[str], batches: Sequence[Batch]) -> dict[str, Tensor]:
    """Return E[x_i²] of the input x of modules, by module, shape `(domains, n)`, fp64."""
    num_domains = 1 + max(batch.domain for batch in batches)
    counts = torch.zeros(num_domains, dtype=torch.float64)
    for batch in batches:
        if batch.counts:
            counts[batch.domain] += batch.ids.numel()

    sums: dict[str, Tensor] = {}

    def add_squares(batch: Batch, name: str, x: Tensor) -> None:
        squares = batch.counted(x).double().square().sum(0).cpu()
        if name not in sums:
            sums[name] = torch.zeros(num_domains, len(squares), dtype=torch.float64)
        sums[name][batch.domain] += squares

    run_watched(model, modules, batches, add_squares)
    all_reduce_([counts])
    all_reduce_([sums[name] for name in modules])
    return {name: total / counts.clamp(min=1)[:, None] for name, total in sums.items()}


def _matrices(model: PreTrainedModel, space: Space) -> list[Axis]:
    """Return the producers of a space that are matrices."""
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
    """Return the scores of SlimLLM (Guo et al., ICML 2025, arXiv 2505.22689), as in its published code.

    The score of a channel j is I_d + I_g + I_u. I_d is ‖|W_:jᵀ V| · w‖ √E[x_j²], where V and λ are the eigenvectors
    and the eigenvalues of the covariance of the consumer's output, and w = sigmoid(λ / mean(λ)). I_g and I_u are √Σ_i
    W_ji² E[x_i²] of the two producers, whose input x is observed in the model before the round.

    The score of a KV group u is -Σ_i |ρ(T_i - o_ui, T_i)|, where o_u is the output of the group, T the output of all
    groups, i counts the outputs, and ρ is Pearson's correlation over tokens.

    Deviations: The published code scores single heads, and exchanges heads while the output of the kept heads comes
    nearer to T. Here the units are groups, and are not exchanged. The published code keeps the 1 % of channels with
    the lowest scores. Here they are removed.
    """
    if columns_per_unit > 1:
        return _group_scores(weight, moments, columns_per_unit)

    assert moments.prior is not None
    mean = weight @ moments.mean.to(weight)
    covariance = (weight @ moments.full_gram().to(weight) @ weight.T).addr_(mean, mean, alpha=-1)
    eigenvalues, eigenvectors = torch.linalg.eigh(covariance.double())

    mean_eigenvalue = eigenvalues.abs().mean().clamp(min=torch.finfo(eigenvalues.dtype).tiny)
    importance = torch.sigmoid(eigenvalues.abs() / mean_eigenvalue)
    projections = (eigenvectors.T @ weight.double()).abs()
    norms = (projections * importance[:, None]).norm(dim=0)
    scores = norms * moments.square.to(norms).sqrt() + moments.prior.to(norms)
    return scores.to(weight)


def _group_scores(weight: Tensor, moments: Moments, columns_per_unit: int) -> Tensor:
    """Return -Σ_i |ρ(T_i - o_ui, T_i)| for each group u; see `slimllm`."""
    with_total, with_each_unit = _covariances(weight, moments, columns_per_unit)
    variances = with_each_unit.diagonal(dim1=1, dim2=2)
    total_variance = with_total.sum(1, keepdim=True)

    covariance_without_unit = total_variance - with_total
    variance_without_unit = total_variance - 2 * with_total + variances
    return -_correlation(covariance_without_unit, variance_without_unit, total_variance).abs().sum(0)


def _covariances(weight: Tensor, moments: Moments, columns_per_unit: int) -> tuple[Tensor, Tensor]:
    """Return the covariances of the output of each unit.

    Args:
        weight: The weight of the consumer, shape `(out, units * columns_per_unit)`.
        moments: The moments of its input.
        columns_per_unit: The number of columns of a unit.

    Returns:
        The covariances with the output of all units together, shape `(out, units)`, and the covariances with each
        unit's output, shape `(out, units, units)`.
    """
    gram = moments.full_gram().to(weight)
    mean = moments.mean.to(weight)

    rows = []
    columns_by_unit = torch.arange(weight.shape[1], device=weight.device).split(columns_per_unit)
    for columns in columns_by_unit:
        input_covariances = gram[columns].addr(mean[columns], mean, alpha=-1)
        products = (weight[:, columns] @ input_covariances) * weight
        rows.append(products.view(len(weight), -1, columns_per_unit).sum(2))

    with_each_unit = torch.stack(rows, 1)
    return with_each_unit.sum(2), with_each_unit


def _correlation(covariance: Tensor, variance: Tensor, other_variance: Tensor) -> Tensor:
    """Return Pearson's correlation of two variables."""
    scale = (variance.clamp(min=0) * other_variance.clamp(min=0)).sqrt()
    return covariance / scale.clamp(min=torch.finfo(scale.dtype).tiny)


@REFITS.register("slope")
def slope_refit(
    weight: Tensor, bias: Tensor | None, moments: Moments, keep: Tensor, damping: float
) -> tuple[Tensor, Tensor | None]:
    """Scale each output by the slope of the regression of its original values on its pruned values.

    This is the regression of SlimLLM (Guo et al., ICML 2025, arXiv 2505.22689). The bias takes the intercept. Without
    a bias, the regression line passes through zero. See `optimum_structprune.method.refit.least_squares` for the
    arguments.
    """
    gram = moments.full_gram().to(weight)
    mean = moments.mean.to(weight)
    kept_weight = weight[:, keep]

    # E[original · pruned] and E[pruned²] of each output.
    products = ((weight @ gram)[:, keep] * kept_weight).sum(1)
    squares = ((kept_weight @ submatrix(gram, keep, keep)) * kept_weight).sum(1)
    if bias is None:
        return _slopes(products, squares)[:, None] * kept_weight, None

    original_mean = weight @ mean
    pruned_mean = kept_weight @ mean[keep]
    covariances = products - original_mean * pruned_mean
    variances = squares - pruned_mean.square()
    slopes = _slopes(covariances, variances)
    return slopes[:, None] * kept_weight, bias + original_mean - slopes * pruned_mean


def _slopes(covariances: Tensor, variances: Tensor) -> Tensor:
    """Return the slopes of regression lines. An output that is constant after pruning has the slope 1."""
    return torch.where(variances > 0, covariances / variances, torch.ones_like(variances))
