"""What forward passes through the whole model say of the input of every consumer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import chain, zip_longest

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..arch.spec import CHANNEL, ArchSpec, Axis
from ..calibration.accumulator import unmasked
from ..errors import StructPruneError
from ..forward.clock import Clock
from ..forward.hooks import observe
from ..forward.layers import Batch
from ..forward.metrics import run_model
from ..system.processes import add_up_, process_count
from .obs import matrices, norms_by_unit


def inflows(
    model: PreTrainedModel, arch: ArchSpec, batches: Sequence[Batch], clock: Clock | None = None
) -> dict[str, Tensor]:
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
        sums = unmasked(x, batch.mask).double().square().sum(0).cpu()
        squares.setdefault(name, torch.zeros(domains, len(sums), dtype=torch.float64))[batch.domain] += sums

    producers = sorted({axis.module for space in channels for axis in matrices(model, space.out)})
    for batch in batches:
        counts[batch.domain] += batch.ids.numel() if batch.mask is None else int(batch.mask.sum())
    _run(model, producers, batches, see, clock)
    add_up_([counts, *(squares[name] for name in producers)])
    means = {name: sums / counts.clamp(min=1)[:, None] for name, sums in squares.items()}
    found = {
        axis.module: torch.zeros(domains, space.size * axis.per_unit, dtype=torch.float64)
        for space in arch.spaces
        for axis in space.into
    }
    for space in channels:
        for axis in space.into:
            for producer in matrices(model, space.out):
                found[axis.module] += norms_by_unit(model, space, producer, means[producer.module])
    return found


def removal_orders(
    model: PreTrainedModel, arch: ArchSpec, batches: Sequence[Batch], clock: Clock | None = None
) -> dict[str, Tensor]:
    """In which order the units of every consumer go if those with the least effect on its output go first.

    The samples are read one after the other, of one domain in turn. The effect of a unit u on a sample is the mean of
    ‖r_t + W_u x_tu‖ over its tokens t, where r_t is what the units removed so far have given. Each sample removes the
    units with the least effect, as many as are left over the number of samples to come.

    Returns:
        A unit's place in the order, from 0 to 1, at each of its columns, by module, shape `(domains, n)`, fp64. It is
        the same for all domains.
    """
    check_dense(arch)
    axes = {axis.module: axis for space in arch.spaces for axis in space.into}
    by_domain: dict[int, list[Batch]] = {}
    for batch in batches:
        by_domain.setdefault(batch.domain, []).append(batch)
    mixed = [batch for batch in chain(*zip_longest(*by_domain.values())) if batch is not None]
    samples = sum(len(batch.ids) for batch in mixed)
    orders = {name: _Order(_weight(model, axis), axis.per_unit, samples) for name, axis in axes.items()}

    def see(batch: Batch, name: str, x: Tensor) -> None:
        for row, sample in enumerate(x.reshape(len(batch.ids), -1, x.shape[-1])):
            orders[name].remove_(unmasked(sample, None if batch.mask is None else batch.mask[row]))

    _run(model, axes, mixed, see, clock)
    places = {name: order.places() for name, order in orders.items()}
    add_up_(places[name] for name in sorted(places))
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


def check_dense(arch: ArchSpec) -> None:
    """Refuse models with experts, whose consumers do not see all tokens."""
    if any(space.experts for space in arch.spaces):
        raise StructPruneError(
            f"This criterion watches consumers that read every token, and {arch.model_type!r} has experts; choose "
            "criterion='obs' or 'wanda'."
        )


@torch.no_grad()
def _run(
    model: PreTrainedModel,
    names: Iterable[str],
    batches: Sequence[Batch],
    see: Callable[[Batch, str, Tensor], None],
    clock: Clock | None,
) -> None:
    clock = clock or Clock(model.device)
    present = batches[0]
    with observe(model, names, lambda name, x: see(present, name, x.detach())):
        for present in batches:
            with clock.running(present.domain):
                run_model(model, present.ids)


def _weight(model: PreTrainedModel, axis: Axis) -> Tensor:
    """The weight of a consumer, shape `(out, n)`."""
    weight = model.get_parameter(axis.param).detach()
    return weight if axis.dim == 1 else weight.T
