"""Iterative channel contribution: units go one sample after the other, those with the least effect first."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, zip_longest

import torch
from torch import Tensor
from transformers import PreTrainedModel

from optimum_structprune import register_criterion
from optimum_structprune.arch.spec import ArchSpec, Axis
from optimum_structprune.config.pruning import StructPruneConfig
from optimum_structprune.criteria import per_unit
from optimum_structprune.method.calibrate import Moments
from optimum_structprune.method.layers import Batch
from optimum_structprune.system.processes import all_reduce_, process_count

from .watching import check_dense, of_samples, run_watched


def removal_orders(model: PreTrainedModel, arch: ArchSpec, batches: Sequence[Batch]) -> dict[str, Tensor]:
    """In which order the units of every consumer go if those with the least effect on its output go first.

    The samples are read one after the other, of one domain in turn. The effect of a unit u on a sample is the mean of
    ‖r_t + W_u x_tu‖ over its tokens t, where r_t is what the units removed so far have given. Each sample removes the
    units with the least effect, as many as are left over the number of samples to come.

    Returns:
        A unit's place in the order, from 0 to 1, at each of its columns, by module, shape `(domains, n)`, fp64. It is
        the same for all domains.
    """
    check_dense(arch)
    axes = {axis.module: axis for space in arch.spaces for axis in space.consumers}
    by_domain: dict[int, list[Batch]] = {}
    for batch in batches:
        by_domain.setdefault(batch.domain, []).append(batch)
    mixed = [batch for batch in chain(*zip_longest(*by_domain.values())) if batch is not None]
    samples = sum(len(batch.ids) for batch in mixed)
    orders = {name: _Order(_weight(model, axis), axis.per_unit, samples) for name, axis in axes.items()}

    def see(batch: Batch, name: str, x: Tensor) -> None:
        for sample in x.reshape(len(batch.ids), -1, x.shape[-1]):
            orders[name].remove_(sample if batch.counts else sample[:0])

    run_watched(model, axes, mixed, see)
    places = {name: order.places() for name, order in orders.items()}
    all_reduce_(places[name] for name in sorted(places))
    domains = 1 + max(by_domain)
    return {name: (place / process_count()).cpu().expand(domains, -1) for name, place in places.items()}


class _Order:
    """The units of a consumer, removed one sample after the other. `weight` has the shape `(out, n)`."""

    def __init__(self, weight: Tensor, per_unit: int, samples: int):
        self.weight, self.per_unit, self.samples = weight.float(), per_unit, samples
        self.units = weight.shape[1] // per_unit
        self.seen = 0
        self.removed: list[int] = []

    @torch.no_grad()
    def remove_(self, x: Tensor) -> None:
        """Take in the inputs of a sample, shape `(tokens, n)`, and remove as many units as it is to remove."""
        self.seen += 1
        due = self.units * self.seen // self.samples - len(self.removed)
        if not due or not len(x):
            return
        effects = removal_effects(self.weight, x.float(), self.removed, self.per_unit)
        effects[self.removed] = torch.inf
        self.removed += effects.topk(due, largest=False).indices.tolist()

    def places(self) -> Tensor:
        """The place of each unit at each of its columns, shape `(n,)`, fp64."""
        places = torch.ones(self.units, dtype=torch.float64, device=self.weight.device)
        places[self.removed] = torch.arange(len(self.removed)).to(places) / self.units
        return places.repeat_interleave(self.per_unit)


def removal_effects(weight: Tensor, x: Tensor, removed: Sequence[int], per_unit: int = 1) -> Tensor:
    """The mean over tokens t of ‖r_t + W_u x_tu‖ for each unit u, shape `(units,)`. `weight` has the shape `(out, n)`,
    `x` `(tokens, n)`.
    """
    units = weight.shape[1] // per_unit
    columns = torch.arange(weight.shape[1], device=weight.device).view(units, per_unit)
    gone = columns[list(removed)].flatten()
    missing = x[:, gone] @ weight[:, gone].T
    if per_unit > 1:
        effects = [(missing + x[:, own] @ weight[:, own].T).norm(dim=1).mean() for own in columns]
        return torch.stack(effects)
    squares = missing.square().sum(1, keepdim=True) + 2 * x * (missing @ weight) + x.square() * weight.square().sum(0)
    return squares.clamp(min=0).sqrt().mean(0)


def _weight(model: PreTrainedModel, axis: Axis) -> Tensor:
    """The weight of a consumer, shape `(out, n)`."""
    weight = model.get_parameter(axis.param).detach()
    return weight if axis.dim == 1 else weight.T


def _check(config: StructPruneConfig, arch: ArchSpec, use: str) -> None:
    check_dense(arch)


@register_criterion("iterative_norm", whole_model_statistics=of_samples(removal_orders), check=_check)
def iterative_norm(weight: Tensor, moments: Moments, columns_per_unit: int) -> Tensor:
    """The score is the place of a unit in the order in which units are removed.

    Those go first whose removal changes the output least, by the mean of ‖r_t + W_u x_tu‖ over tokens t, where r_t is
    what the units removed before have given. This is `IterativeChannelContributionHook` of NVIDIA's Model Optimizer
    0.47 (`modelopt/torch/nas/plugins/megatron_hooks/base_hooks.py`) without its optional scaling of the dense output,
    one sample after the other; see `removal_orders`. There the units are channels; for KV groups the
    formula is ours.
    """
    assert moments.prior is not None
    return per_unit(moments.prior.to(weight), columns_per_unit) / columns_per_unit
