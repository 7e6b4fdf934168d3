"""The step that takes out whole experts, and the refit of the others toward the outputs of all."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..arch.hooks import observe
from ..arch.shrink import shrunk_config
from ..arch.spec import EXPERT, Axis, Space, Widths
from ..criteria import criterion_of
from ..method.calibrate import Moments
from ..method.layers import Gain, InMemory, OneProcess
from ..method.loop import best_units
from ..method.refit import least_squares
from ..method.shrink import read_consumer, shrink_layer_, write_consumer_
from ..record.plan import Plan
from ..sources.data import CalibrationData, source_of
from ..sources.experts import contributions, experts_of, inner_activations, route
from ..sources.whole_model import WholeModel
from ..system.processes import all_reduce_
from ..system.stages import progress
from .base import RunState, Step
from .resize import rebuilding_


class DropExperts(Step):
    """Remove the experts that contribute least from every layer, and refit the others.

    An expert cannot be masked: a router is a softmax over logits, and no weight makes one of them minus infinity. So
    this step comes before the rounds, and the layers shrink at once.
    """

    def prune_(self, state: RunState, widths: Widths) -> Plan:
        """Prune every layer to a number of experts, and return the kept experts."""
        model, arch, data = state.model, state.arch, state.data
        keep: dict[tuple[int, str], tuple[int, ...]] = {}
        with state.report.timed("experts"):
            criterion = criterion_of(state.config.scored_by, EXPERT)
            source = source_of(model, arch, data.own_batches, state.config.feedback_share)
            with rebuilding_(model, shrunk_config(model.config, arch, widths)) as smaller:
                for layer in progress(range(arch.num_layers), desc="experts", unit="layer"):
                    with source.at(layer, changes=True):
                        source.advance_dense(layer, widths)
                        spaces = [space for space in arch.at(layer) if space.kind in widths]
                        refits: dict[tuple[int, str], ExpertRefit] = {}
                        if state.config.refit == "least_squares":
                            refits = {space.key: ExpertRefit(source, space, data) for space in spaces}
                        for space in spaces:
                            see = refits[space.key].see_dense if refits else None
                            scores = data.combined(contributions(source, space, criterion, see))
                            keep[space.key] = best_units(scores, space.width_in(widths))

                        state.changed = True
                        shrink_layer_(model, arch, layer, keep, smaller)
                        for key, refit in refits.items():
                            refit.fit_(len(keep[key]))
                        source.advance(layer)
        return Plan(arch.model_type, keep)


class Block(NamedTuple):
    """A consumer whose output is added to others', and the tokens and inputs, `(tokens, n)`, of a call."""

    axis: Axis
    inputs: Callable[[int], tuple[Tensor, Tensor]]


@torch.no_grad()
def refit_blocks_(
    model: Any, blocks: list[Block], residual: list[Tensor], ranks: OneProcess, prior: float = 2, sweeps: int = 3
) -> None:
    """Refit the weights of several consumers so that the sum of their outputs makes up for a residual.

    Each in turn is fitted to what the present weights of the others leave, which is block coordinate descent: in
    memory are the inputs and the Gram matrix of one consumer. The ridge pulls toward the weights that it began with,
    which count as much as `prior` tokens for each column. `residual` holds one tensor per call, shape `(tokens, out)`,
    in fp32, from which is taken what the change gives.
    """
    before = [read_consumer(model, block.axis, dtype=None)[0].cpu() for block in blocks]
    for block, old in list(zip(blocks, before, strict=True)) * sweeps:
        present, bias = read_consumer(model, block.axis)
        start = old.to(present.device).float()
        columns = torch.arange(start.shape[1], device=start.device)
        moments = Moments.empty(len(columns), True, start.device, len(start))
        read = [block.inputs(number) for number in range(len(residual))]
        for left, (tokens, x) in zip(residual, read, strict=True):
            moments.update(x, left[tokens] + x @ (present - start).T)
        if not ranks.sum_(moments).count:
            continue
        ridge = prior * len(columns) / moments.count
        write_consumer_(model, block.axis, columns, least_squares(start, None, moments, columns, ridge)[0], bias)
        change = read_consumer(model, block.axis)[0] - present
        for left, (tokens, x) in zip(residual, read, strict=True):
            left.index_add_(0, tokens, x @ change.T, alpha=-1)


class ExpertRefit:
    """Fits the experts of a layer that stay, and its shared experts, to the outputs of all experts.

    The target is the dense experts' output for the present inputs, and where it comes straight into the layer's, the
    part of the accumulated residual error to correct. Fitted outputs are multiplied by the gates of the new routing,
    so a change in the size of the gates is made up for as well. A shared expert takes part where its output comes
    straight into the layer's. It is made while the layer has its dense weights, for the `space` of its experts.
    """

    def __init__(self, source: InMemory | WholeModel, space: Space, data: CalibrationData):
        self.source, self.space, self.data = source, space, data
        self.gain = self._gain(str(space.experts))
        self.targets: list[Tensor] = []
        self.energy = torch.zeros(self.source.num_domains, 2, dtype=torch.float64)

    def _gain(self, module: str) -> float | None:
        """The factor of a module's output in the layer's; None where it takes another path."""
        source = self.source
        path = source.residual_path(self.space.layer, module) if isinstance(source, InMemory) else None
        return path.factor if isinstance(path, Gain) else None

    def see_dense(self, number: int, routed: Tensor, output: Any) -> None:
        """Note the experts' outputs for a batch, shape `(tokens, hidden)`, while all of them are there."""
        batch, source, target = self.source.batches[number], self.source, routed.float()
        energy = target.square().sum(dtype=torch.float64)
        self.energy[batch.domain] += torch.stack([energy, energy.new_tensor(len(target))]).cpu()
        if self.gain is not None and isinstance(source, InMemory) and source.error_feedback:
            dense = source.dense[number].to(output.device)
            error = batch.counted(source.error_feedback * (dense.float() - output.float()))
            target = target + error / self.gain
        self.targets.append(target)

    def scales(self) -> list[float]:
        """Gives the root of each token's weight by batch; domains count by share over dense output energy."""
        all_reduce_([self.energy])
        energy, count = self.energy.unbind(1)
        weights = torch.tensor(self.data.shares).double() * count / energy.where(energy > 0, torch.inf)
        weights = weights / weights.sum().clamp(min=torch.finfo(weights.dtype).tiny)
        roots = (weights * count.sum() / count.clamp(min=1)).sqrt().tolist()
        return [roots[batch.domain] for batch in self.source.batches]

    def fit_(self, kept: int) -> None:
        """Refit the layer, which has only the `kept` experts now."""
        experts, scales, shared = experts_of(self.source, self.space), self.scales(), self._shared()
        residual: list[Tensor] = []
        seen: dict[str, list[Tensor]] = {axis.module: [] for axis, _ in shared}

        def see(number: int, routed: Tensor, output: Any) -> None:
            residual.append((self.targets[number] - routed.float()) * scales[number])

        def see_shared(module: str, x: Tensor) -> None:
            seen[module].append(self.source.batches[len(seen[module])].counted(x.detach()))

        with observe(self.source.model, seen, see_shared):
            calls = route(self.source, self.space, see)
        self.targets = []

        def inputs_of_expert(expert: int, space: Space, number: int) -> tuple[Tensor, Tensor]:
            tokens, hidden, gates = calls[number].of(expert)
            return tokens, inner_activations(experts, space, hidden).float() * (gates * scales[number])[:, None]

        def inputs_of_shared(module: str, gain: float, number: int) -> tuple[Tensor, Tensor]:
            x = seen[module][number].float() * (gain * scales[number])
            return torch.arange(len(x), device=x.device), x

        blocks = [Block(axis, partial(inputs_of_shared, axis.module, gain)) for axis, gain in shared]
        inside = [space for space in self.source.arch.at(self.space.layer) if space.inside and space.experts]
        for expert, space in enumerate(inside[:kept]):  # those that stay are numbered anew
            blocks.append(Block(space.consumers[0], partial(inputs_of_expert, expert, space)))
        refit_blocks_(self.source.model, blocks, residual, self.source.ranks)

    def _shared(self) -> list[tuple[Axis, float]]:
        """Gives the consumers of shared experts in the module of the experts, and their relative gains."""
        prefix = f"{str(self.space.experts).rpartition('.')[0]}."
        found: list[tuple[Axis, float]] = []
        for space in self.source.arch.at(self.space.layer) if self.gain is not None else ():
            if space.inside and space.experts is None and space.consumers[0].module.startswith(prefix):
                gain = self._gain(space.consumers[0].module)
                found += [] if gain is None else [(space.consumers[0], gain / (self.gain or 1.0))]
        return found
