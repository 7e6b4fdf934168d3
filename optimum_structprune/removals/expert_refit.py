"""The refit of the experts that stay, when others have gone: least squares toward what all of them gave."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..arch.hooks import observe
from ..arch.spec import Axis, Space
from ..method.calibrate import Moments
from ..method.layers import Gain, InMemory, OneProcess
from ..method.linalg import ridge_strength
from ..method.refit import least_squares
from ..method.shrink import read_consumer, units_to_columns, write_consumer_
from ..sources.data import CalibrationData
from ..sources.experts import WithExperts, inner_activations
from ..system.processes import all_reduce_


# With two passes over the experts the result is close to solving for all of them at once; the third gains little more.
SWEEPS = 3


class Block(NamedTuple):
    """A consumer among several whose outputs are added: its space and its axis, and what it reads of the call with a
    number, the numbers of the tokens and its inputs, shape `(tokens, n)`.
    """

    space: Space
    axis: Axis
    inputs: Callable[[int], tuple[Tensor, Tensor]]


@torch.no_grad()
def refit_blocks_(
    model: Any, blocks: Sequence[Block], residual: Sequence[Tensor], damping: float, ranks: OneProcess
) -> None:
    """Refit the weights of several consumers so that the sum of their outputs makes up for a residual.

    Each in turn is fitted to what the present weights of the others leave, which is block coordinate descent: in
    memory are the inputs and the Gram matrix of one consumer. The ridge pulls toward the weights that it began with.
    `residual` holds one tensor per call, shape `(tokens, out)`, in fp32, from which is taken what the change gives.
    """
    before = [read_consumer(model, block.axis, dtype=None)[0] for block in blocks]
    for block, old in list(zip(blocks, before, strict=True)) * SWEEPS:
        start, (present, bias) = old.float(), read_consumer(model, block.axis)
        columns = units_to_columns(range(block.space.size), block.axis, start.device)
        moments = Moments.empty(len(columns), True, start.device, len(start))
        read = [block.inputs(number) for number in range(len(residual))]
        for left, (tokens, x) in zip(residual, read, strict=True):
            moments.update(x, left[tokens] + x @ (present - start).T)
        if not ranks.sum_(moments).count:
            continue
        ridge = ridge_strength(damping, len(columns), moments.count)
        write_consumer_(model, block.axis, columns, least_squares(start, None, moments, columns, ridge)[0], bias)
        change = read_consumer(model, block.axis)[0] - present
        for left, (tokens, x) in zip(residual, read, strict=True):
            left.index_add_(0, tokens, x @ change.T, alpha=-1)


class ExpertRefit:
    """Fits the experts of a layer that stay, and its shared experts, to what the layer gave with all experts.

    What is asked for is what the experts gave of the present inputs and, where their output comes straight into that of
    the layer, the share of the error of the residual stream so far that error feedback makes up for. The new routing
    counts, so a change in the size of the gates is made up for as well.

    Args:
        source: The source of the activations.
        space: The space of the experts of a layer, which has its dense weights.
        data: The calibration data, for the weights of the domains.
    """

    def __init__(self, source: WithExperts, space: Space, data: CalibrationData):
        self.source, self.space, self.data = source, space, data
        inner: Any = source.source
        self.path = inner.residual_path(space.layer, space.experts) if isinstance(inner, InMemory) else None
        self.asked: list[Tensor] = []
        self.energy = torch.zeros(source.num_domains, 2, dtype=torch.float64)

    def see_dense(self, number: int, given: Tensor, output: Any) -> None:
        """Note what the experts of a batch give, shape `(tokens, hidden)`, while all of them are there."""
        batch, inner = self.source.batches[number], self.source.source
        asked = given.float()
        energy = asked.square().sum(dtype=torch.float64)
        self.energy[batch.domain] += torch.stack([energy, energy.new_tensor(len(asked))]).cpu()
        if isinstance(self.path, Gain) and isinstance(inner, InMemory) and inner.error_feedback:
            dense = inner.dense[number].to(output.device)
            error = batch.counted(inner.error_feedback * (dense.float() - output.float()))
            asked = asked + error / self.path.factor
        self.asked.append(asked)

    def roots(self) -> list[float]:
        """The root of the weight of a token of each domain: the mean is 1, and a domain counts by its share of the
        mixture, relative to its output energy.
        """
        all_reduce_([self.energy])
        energy, count = self.energy.unbind(1)
        known = energy > 0
        weights = torch.where(known, torch.tensor(self.data.shares).double() * count / energy.where(known, 1), 0.0)
        weights = weights / weights.sum().clamp(min=torch.finfo(weights.dtype).tiny)
        return (weights * count.sum() / count.clamp(min=1)).sqrt().tolist()

    def fit_(self, kept: int, damping: float) -> None:
        """Refit the layer, which has only the `kept` experts now."""
        model, layer = self.source.model, self.space.layer
        experts, roots = model.get_submodule(str(self.space.experts)), self.roots()
        scale = [roots[batch.domain] for batch in self.source.batches]
        residual: list[Tensor] = []

        def see(number: int, given: Tensor, output: Any) -> None:
            residual.append((self.asked[number] - given.float()) * scale[number])

        with self._observed_shared(scale) as blocks:
            calls = self.source.route(layer, experts, see)

        def reader(space: Space, expert: int) -> Callable[[int], tuple[Tensor, Tensor]]:
            def inputs(number: int) -> tuple[Tensor, Tensor]:
                tokens, hidden, gates = calls[number].of(expert)
                inner = inner_activations(experts, space, hidden).float()
                return tokens, inner * (gates.float() * scale[number])[:, None]

            return inputs

        inside = [space for space in self.source.arch.at(layer) if space.inside and space.experts is not None]
        for expert, space in enumerate(inside[:kept]):  # those that stay are numbered anew
            blocks.append(Block(space, space.consumers[0], reader(space, expert)))
        refit_blocks_(model, blocks, residual, damping, self.source.ranks)
        self.asked = []

    @contextmanager
    def _observed_shared(self, scale: Sequence[float]) -> Iterator[list[Block]]:
        """The blocks of the shared experts, which read what is observed inside `with`: the consumers in the module of
        the experts whose output comes into the layer's by a gain, as the experts' own does.
        """
        prefix, seen = f"{str(self.space.experts).rpartition('.')[0]}.", dict[str, list[Tensor]]()
        blocks: list[Block] = []
        for space in self.source.arch.at(self.space.layer) if isinstance(self.path, Gain) else ():
            axis = space.consumers[0] if space.inside and space.experts is None else None
            if axis is None or len(space.consumers) > 1 or not axis.module.startswith(prefix):
                continue
            path = self.source.residual_path(space.layer, axis.module)
            if isinstance(path, Gain):
                factor, read = path.factor / self.path.factor, seen.setdefault(axis.module, [])
                blocks.append(Block(space, axis, lambda number, r=read, f=factor: _all(r[number] * (f * scale[number]))))
        number = 0

        def see(module: str, x: Tensor) -> None:
            seen[module].append(self.source.batches[len(seen[module])].counted(x.detach()).float())

        with observe(self.source.model, seen, see):
            yield blocks


def _all(x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.arange(len(x), device=x.device), x
