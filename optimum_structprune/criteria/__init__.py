"""Criteria: each a function that turns weights and activations into scores, higher = keep, with the paper it is from.

`Criterion` in `method.loop` says what such a function is given, and what else it may need.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from transformers import PreTrainedModel

from ..arch.hooks import first_of, hidden_states_of, intercept
from ..arch.modules import layer_list
from ..arch.spec import CHANNEL, EXPERT, LAYER, ArchSpec, Axis, Space
from ..method.calibrate import Moments
from ..method.layers import Batch, run_model
from ..method.loop import Criterion
from ..method.refit import ridge_strength, with_damped_factor
from ..registry import Registry
from ..system.processes import all_reduce_


CRITERIA: Registry[Criterion] = Registry("criterion", "optimum_structprune.criteria")
# The criteria of whole layers and whole experts where the config names one of something else.
DEFAULT_CRITERIA = {LAYER: "block_influence", EXPERT: "reap"}


def register_criterion(name: str, **attributes: Any) -> Callable[[Callable[..., Tensor]], Criterion]:
    """Give a decorator that makes a `Criterion` of a score function and enters it under a name.

    Args:
        name: The name that `StructPruneConfig.criterion` takes.
        attributes: The other fields of the `Criterion`, such as `needs_gram=True`.

    Raises:
        StructPruneError: If the name is empty, or already stands for another criterion.
    """
    return lambda score: CRITERIA.register(name)(Criterion(name, score, **attributes))


def criterion_of(name: str, judged: str) -> Criterion:
    """The criterion with a name if it scores what is `judged`, whole layers or experts; else their default."""
    criterion = CRITERIA.get(name)
    return criterion if criterion.judges == judged else CRITERIA.get(DEFAULT_CRITERIA[judged])


def per_unit(columns: Tensor, columns_per_unit: int) -> Tensor:
    """The sum over the columns of each unit, shape `(units,)`, of values of shape `(units * columns_per_unit,)`."""
    return columns.reshape(-1, columns_per_unit).sum(1)


@register_criterion("wanda", paper="Sun et al. 2023, arXiv:2306.11695")
def wanda(weight: Tensor, moments: Moments, columns_per_unit: int, options: Any) -> Tensor:
    """The score is √(Σ_j ‖W_:j‖² · E[x_j²]) over the columns j of a unit.

    For one column it is ‖W_:j‖ · √E[x_j²], eq. 1 of Wanda (Sun et al. 2023) per column.
    """
    return per_unit(weight.square().sum(0) * moments.square.to(weight), columns_per_unit).sqrt()


@register_criterion("flap", paper="An et al. 2023, arXiv:2312.11983")
def flap(weight: Tensor, moments: Moments, columns_per_unit: int, options: Any) -> Tensor:
    """The score is Var[x_j] · ‖W_:j‖², summed over the columns j of a unit (FLAP, An et al. 2023, eq. 5)."""
    return per_unit(moments.variance.to(weight) * weight.square().sum(0), columns_per_unit)


@register_criterion("magnitude")
def magnitude(weight: Tensor, moments: Moments, columns_per_unit: int, options: Any) -> Tensor:
    """The score is ‖W_:u‖, the norm of the columns that consume the unit u."""
    return per_unit(weight.square().sum(0), columns_per_unit).sqrt()


@register_criterion("random")
def random(weight: Tensor, moments: Moments, columns_per_unit: int, options: Any) -> Tensor:
    """The scores are uniform random numbers from the seed."""
    generator = torch.Generator().manual_seed(options.seed)
    return torch.rand(weight.shape[1] // columns_per_unit, generator=generator).to(weight)


@register_criterion("obs", paper="ZipLM, Kurtic et al. 2023, arXiv:2302.04089", needs_gram=True)
def obs(weight: Tensor, moments: Moments, columns_per_unit: int, options: Any) -> Tensor:
    """The score is ½ tr(W_u [H⁻¹]_uu⁻¹ W_uᵀ) for a unit u, which is ½ ‖W_:j‖² / [H⁻¹]_jj for a single column j: the
    error that remains after the best refit of the other columns.

    It is eq. 2 of ZipLM (Kurtic et al. 2023), with H = E[x xᵀ] damped as in the refit.
    """
    gram = moments.full_gram()
    diagonal = gram.diagonal()
    if float(diagonal.sum()) <= 0:
        return weight.new_zeros(len(gram) // columns_per_unit)
    return with_damped_factor(
        lambda dtype: gram.to(weight.device, dtype, copy=True),
        diagonal,
        ridge_strength(float(options.damping), len(gram), moments.count),
        lambda factor: _losses(weight, factor, columns_per_unit),
    )


def producer_norms(model: nn.Module, arch: ArchSpec, space: Space) -> Tensor | None:
    """Σ_W √Σ_i W_ji² γ_i² of each channel j of a space, over the producers W that give it, shape `(units,)`.

    γ is the weight of the norm that a producer reads from, and 1 where the residual stream of the model is not
    described or there is no norm. It is how much the channel's inputs vary if the components of what a norm gives vary
    alike, so it needs no text. None where the units are no single channels, or no producer is a matrix.
    """
    axes = [axis for axis in space.producers if space.unit == CHANNEL and _matrix(model, axis).ndim == 2]
    norms = [norms_by_unit(model, space, axis, _norm_before(model, arch, space, axis).square()) for axis in axes]
    return torch.stack(norms).sum(0) if norms else None


@torch.no_grad()
def norms_by_unit(model: nn.Module, space: Space, axis: Axis, squares: Tensor) -> Tensor:
    """√Σ_i W_ji² E[x_i²] of the channels j of a space, summed over the rows of a channel. `squares` has the shape `(…,
    n)`, the result `(…, units)`, in the dtype and on the device of `squares`.
    """
    total = squares @ _matrix(model, axis).to(squares).square()
    return total[..., axis.indices(range(space.size))].sqrt().unflatten(-1, (space.size, -1)).sum(-1)


def _matrix(model: nn.Module, axis: Axis) -> Tensor:
    """The parameter of a producer, of one expert where the axis names one, with the units along its last dimension."""
    parameter, dim = model.get_parameter(axis.param).detach(), axis.dim
    if axis.part is not None:
        parameter, dim = parameter[axis.part], dim - 1
    return parameter.movedim(dim, -1)


def _norm_before(model: nn.Module, arch: ArchSpec, space: Space, axis: Axis) -> Tensor:
    """The weight of the norm that a producer reads from, or ones, shape `(n,)`, fp32."""
    for read in arch.residual.reads if arch.residual is not None else ():
        if read.norm and read.layer == space.layer and any(reader.param == axis.param for reader in read.readers):
            weight = getattr(model.get_submodule(read.tap), "weight", None)
            if weight is not None and arch.residual is not None:
                return weight.detach().float() + arch.residual.norm_offset
    matrix = _matrix(model, axis)
    return torch.ones(len(matrix), device=matrix.device)


@register_criterion(
    "obs_drive", paper="SlimLLM, Guo et al. 2025, arXiv:2505.22689", needs_gram=True, prior=producer_norms
)
def obs_drive(weight: Tensor, moments: Moments, columns_per_unit: int, options: Any) -> Tensor:
    """The score is that of `obs` and the producer norm of a channel, each relative to its mean over the channels.

    With o_j the score of `obs`, d_j the norm of `producer_norms`, and means over the channels, it is
    (√o_j + d_j · mean(√o) / mean(d))² / 4. The norm says how strongly its producers drive a channel: where
    they do, it says less of other text that the channel has done little on the calibration text. SlimLLM (Guo et al.,
    ICML 2025, arXiv 2505.22689) adds a similar term to its score. Units of several columns are scored as by `obs`.
    """
    losses = obs.score(weight, moments, columns_per_unit, options)
    if moments.prior is None or columns_per_unit > 1:
        return losses
    norms, roots = moments.prior.to(losses), losses.clamp(min=0).sqrt()
    scale = roots.mean() / norms.mean().clamp(min=torch.finfo(norms.dtype).tiny)
    return (roots + norms * scale).square() / 4


@register_criterion(DEFAULT_CRITERIA[LAYER], judges=LAYER, paper="ShortGPT, Men et al. 2024, arXiv:2403.03853")
@torch.no_grad()
def block_influence(model: PreTrainedModel, arch: ArchSpec, batches: Sequence[Batch]) -> Tensor:
    """The score is the mean of 1 - cos(input, output) of a layer over tokens (ShortGPT, Men et al. 2024, eq. 1)."""
    lost: list[list[Tensor]] = [[] for _ in range(arch.num_layers)]
    inputs: dict[int, Tensor] = {}
    count, batch = 0, batches[0]

    def before(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs[index] = hidden_states_of(args, kwargs)

    def after(index: int, output: Any) -> None:
        entering, leaving = (batch.counted(x.double()) for x in (inputs.pop(index), first_of(output)))
        lost[index].append((1 - cosine_similarity(entering.to(leaving.device), leaving, dim=-1)).sum())

    with intercept(layer_list(model, arch), before, after):
        for batch in batches:
            run_model(model.base_model, batch.ids)  # type: ignore[arg-type]
            count += batch.ids.numel() * batch.counts
    total = torch.stack([torch.stack(parts).sum().cpu() for parts in lost])
    tokens = torch.tensor(float(count), dtype=torch.float64)
    all_reduce_([total, tokens])
    return total / tokens


@register_criterion(DEFAULT_CRITERIA[EXPERT], judges=EXPERT, paper="REAP, Lasby et al. 2025, arXiv:2510.13999")
def reap(norms: Tensor, gates: Tensor) -> Tensor:
    """The score is the mean of g · ‖f(x)‖ over the tokens that chose an expert f with the gate g (REAP, eq. 8)."""
    return norms * gates


@register_criterion("reap_sum", judges=EXPERT, summed=True, paper="REAP, Lasby et al. 2025, arXiv:2510.13999")
def reap_sum(norms: Tensor, gates: Tensor) -> Tensor:
    """The score is the sum of `reap`, and not the mean: what an expert adds in all, however many tokens share it."""
    return norms * gates


def _losses(weight: Tensor, factor: Tensor, columns_per_unit: int) -> Tensor:
    """Gives ½ tr(W_u [H⁻¹]_uu⁻¹ W_uᵀ) of each unit u, `(units,)`, by the Cholesky factor of H, `(n, n)`.

    H⁻¹ takes the place of the factor. NaN stands for units whose part of it rounding has made indefinite.
    """
    inverse = torch.cholesky_inverse(factor, out=factor)
    if columns_per_unit == 1:  # the general way factors many matrices of one number, which threads make very slow
        return (0.5 * weight.double().square().sum(0) / inverse.diagonal().double()).to(weight)
    units = weight.shape[1] // columns_per_unit
    # Shape (units, columns_per_unit, columns_per_unit), and (units, columns_per_unit, out) for the weight.
    by_unit = inverse.view(units, columns_per_unit, units, columns_per_unit)
    tiles = by_unit.diagonal(dim1=0, dim2=2).movedim(-1, 0).double()
    dense = weight.reshape(-1, units, columns_per_unit).movedim(0, -1).double()
    # The batched LU of torch 2.13's CPU build fails from 160 columns on once several threads are set.
    factors, failed = torch.linalg.cholesky_ex(tiles)
    losses = 0.5 * torch.linalg.solve_triangular(factors, dense, upper=False).square().sum((1, 2))
    return losses.where(failed == 0, torch.nan).to(weight)
