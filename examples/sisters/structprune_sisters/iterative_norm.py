"""Iterative channel contribution: each sample removes the units that have the least effect on the output."""

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

from .watching import check_dense, consumers_of, of_samples, run_watched


def removal_orders(model: PreTrainedModel, arch: ArchSpec, batches: Sequence[Batch]) -> dict[str, Tensor]:
    """Return the order in which the units of every consumer are removed if each sample removes the least effective.

    The batches of the domains alternate. The effect of a unit u on a sample is the mean of ‖r_t + W_u x_tu‖ over the
    tokens t of the sample, where r_t is the output of the units that were removed by earlier samples. Each sample
    removes the units with the least effect: the number of remaining units, divided by the number of remaining samples.

    Returns:
        The place of a unit in the order, from 0 to 1, at each column of the unit, by module, shape `(domains, n)`,
        fp64. All domains have the same place.
    """
    check_dense(arch)
    batches = _alternate_domains(batches)
    num_domains = 1 + max(batch.domain for batch in batches)
    num_samples = sum(len(batch.ids) for batch in batches)
    orders: dict[str, _Order] = {}
    for axis in consumers_of(arch):
        orders[axis.module] = _Order(_weight(model, axis), axis.per_unit, num_samples)

    def remove_units(batch: Batch, name: str, x: Tensor) -> None:
        for sample in x.reshape(len(batch.ids), -1, x.shape[-1]):
            if not batch.counts:
                sample = sample[:0]
            orders[name].remove_(sample)

    run_watched(model, list(orders), batches, remove_units)

    places = {name: order.places() for name, order in orders.items()}
    all_reduce_([places[name] for name in sorted(places)])
    return {name: (place / process_count()).cpu().expand(num_domains, -1) for name, place in places.items()}


def _alternate_domains(batches: Sequence[Batch]) -> list[Batch]:
    """Return the first batch of each domain, then the second batch of each domain, and so on."""
    batches_by_domain: dict[int, list[Batch]] = {}
    for batch in batches:
        batches_by_domain.setdefault(batch.domain, []).append(batch)

    turns = zip_longest(*batches_by_domain.values())
    return [batch for batch in chain.from_iterable(turns) if batch is not None]


class _Order:
    """The order in which samples remove the units of a consumer.

    Args:
        weight: The weight of the consumer, shape `(out, n)`.
        per_unit: The number of columns of a unit.
        num_samples: The number of samples.
    """

    def __init__(self, weight: Tensor, per_unit: int, num_samples: int):
        self.weight = weight.float()
        self.per_unit = per_unit
        self.num_samples = num_samples
        self.num_units = weight.shape[1] // per_unit
        self.samples_so_far = 0
        self.removed: list[int] = []

    @torch.no_grad()
    def remove_(self, x: Tensor) -> None:
        """Remove the units that are due with the next sample, whose inputs `x` have the shape `(tokens, n)`.

        A sample without tokens removes no units. They are due with the sample after it.
        """
        self.samples_so_far += 1
        num_due = self.num_units * self.samples_so_far // self.num_samples - len(self.removed)
        if num_due == 0 or len(x) == 0:
            return

        effects = removal_effects(self.weight, x.float(), self.removed, self.per_unit)
        effects[self.removed] = torch.inf
        self.removed += effects.topk(num_due, largest=False).indices.tolist()

    def places(self) -> Tensor:
        """Return the place of each unit at each of its columns, shape `(n,)`, fp64."""
        places = torch.ones(self.num_units, dtype=torch.float64, device=self.weight.device)
        places[self.removed] = torch.arange(len(self.removed)).to(places) / self.num_units
        return places.repeat_interleave(self.per_unit)


def removal_effects(weight: Tensor, x: Tensor, removed: Sequence[int], per_unit: int = 1) -> Tensor:
    """Return the mean of ‖r_t + W_u x_tu‖ over the tokens t for each unit u.

    Args:
        weight: The weight W of the consumer, shape `(out, n)`.
        x: The inputs, shape `(tokens, n)`.
        removed: The removed units. Their output is r.
        per_unit: The number of columns of a unit.

    Returns:
        Shape `(units,)`.
    """
    num_units = weight.shape[1] // per_unit
    columns_by_unit = torch.arange(weight.shape[1], device=weight.device).view(num_units, per_unit)
    removed_columns = columns_by_unit[list(removed)].flatten()
    removed_output = x[:, removed_columns] @ weight[:, removed_columns].T

    if per_unit > 1:
        effects = []
        for columns in columns_by_unit:
            output = x[:, columns] @ weight[:, columns].T
            effects.append((removed_output + output).norm(dim=1).mean())
        return torch.stack(effects)

    # With one column per unit, ‖r + W_u x_u‖² = ‖r‖² + 2 x_u rᵀ W_u + x_u² ‖W_u‖².
    removed_squares = removed_output.square().sum(1, keepdim=True)
    products = x * (removed_output @ weight)
    squares = x.square() * weight.square().sum(0)
    return (removed_squares + 2 * products + squares).clamp(min=0).sqrt().mean(0)


def _weight(model: PreTrainedModel, axis: Axis) -> Tensor:
    """Return the weight of a consumer, shape `(out, n)`."""
    weight = model.get_parameter(axis.param).detach()
    if axis.dim == 1:
        return weight
    return weight.T


def _check(config: StructPruneConfig, arch: ArchSpec, use: str) -> None:
    check_dense(arch)


@register_criterion("iterative_norm", whole_model_statistics=of_samples(removal_orders), check=_check)
def iterative_norm(weight: Tensor, moments: Moments, columns_per_unit: int) -> Tensor:
    """Return the place of each unit in the order of removal; see `removal_orders`.

    This is `IterativeChannelContributionHook` of NVIDIA's Model Optimizer 0.47
    (`modelopt/torch/nas/plugins/megatron_hooks/base_hooks.py`) without the optional scaling of the original output,
    and with one sample at a time. Its units are channels. The formula for KV groups is our own.
    """
    assert moments.prior is not None
    return per_unit(moments.prior.to(weight), columns_per_unit) / columns_per_unit
