"""The step that removes whole experts, and refits the others to the outputs of all."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..arch.hooks import observe
from ..arch.shrink import shrunk_config
from ..arch.spec import EXPERT, Axis, Space, Widths
from ..criteria import criterion_of
from ..method.calibrate import Moments
from ..method.layers import Gain, InMemory, OneProcess
from ..method.loop import Criterion, best_units
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
    """Remove the experts with the smallest contributions from every layer, and refit the others.

    An expert cannot be masked: a router is a softmax over logits, and no weight makes one of them minus infinity. So
    this step comes before the rounds, and the layers shrink at once.
    """

    def prune_(self, state: RunState, widths: Widths) -> Plan:
        """Prune every layer to a number of experts, and return the kept experts."""
        model, arch = state.model, state.arch
        keep: dict[tuple[int, str], tuple[int, ...]] = {}
        with state.report.timed("experts"):
            criterion = criterion_of(state.config.scored_by, EXPERT)
            source = source_of(model, arch, state.data.own_batches, state.config.feedback_share)
            with rebuilding_(model, shrunk_config(model.config, arch, widths)) as smaller:
                for layer in progress(range(arch.num_layers), desc="Removing experts", unit="layer"):
                    with source.at(layer, changes=True):
                        source.advance_dense(layer, widths)
                        _remove_from_layer_(state, widths, source, layer, criterion, keep, smaller)
                        source.advance(layer)
        return Plan(arch.model_type, keep)


def _remove_from_layer_(
    state: RunState,
    widths: Widths,
    source: InMemory | WholeModel,
    layer: int,
    criterion: Criterion,
    keep: dict[tuple[int, str], tuple[int, ...]],
    smaller: PreTrainedModel,
) -> None:
    """Remove experts from one layer, add the kept ones to `keep`, and refit these."""
    spaces = [space for space in state.arch.at(layer) if space.kind in widths]
    refits: dict[tuple[int, str], ExpertRefit] = {}
    if state.config.refit == "least_squares":
        refits = {space.key: ExpertRefit(source, space, state.data) for space in spaces}

    for space in spaces:
        see = refits[space.key].see_dense if refits else None
        scores = state.data.combined(contributions(source, space, criterion, see))
        keep[space.key] = best_units(scores, space.width_in(widths))

    state.changed = True
    shrink_layer_(state.model, state.arch, layer, keep, smaller)
    for key, refit in refits.items():
        refit.fit_(len(keep[key]))


class Block(NamedTuple):
    """A consumer whose output is added to that of other consumers.

    `inputs` takes the number of a call, and returns the tokens that the consumer reads, shape `(n,)`, and its inputs
    for them, shape `(n, columns)`.
    """

    axis: Axis
    inputs: Callable[[int], tuple[Tensor, Tensor]]


@torch.no_grad()
def refit_blocks_(
    model: Any, blocks: list[Block], residual: list[Tensor], ranks: OneProcess, prior: float = 2, sweeps: int = 3
) -> None:
    """Refit the weights of several consumers, so that the sum of their outputs makes up for a residual.

    Block coordinate descent: each consumer in turn is fitted to the residual that the present weights of the others
    leave. In memory are the inputs and the Gram matrix of one consumer.

    Args:
        model: The model with the consumers, whose weights change.
        blocks: The consumers.
        residual: The missing output by call, shape `(tokens, out)`, fp32. The change of the output is subtracted.
        ranks: The processes that share the calls.
        prior: The ridge pulls toward the first weights, as if they were fitted to `prior` tokens for each column.
        sweeps: The number of times that each consumer is fitted.
    """
    first_weights = [read_consumer(model, block.axis, dtype=None)[0].cpu() for block in blocks]
    for _ in range(sweeps):
        for block, first_weight in zip(blocks, first_weights, strict=True):
            _refit_block_(model, block, first_weight, residual, ranks, prior)


def _refit_block_(
    model: Any, block: Block, first_weight: Tensor, residual: list[Tensor], ranks: OneProcess, prior: float
) -> None:
    """Refit one consumer to the present residual, and subtract the change of its output; see `refit_blocks_`."""
    present, bias = read_consumer(model, block.axis)
    start = first_weight.to(present.device).float()
    out, num_columns = start.shape
    columns = torch.arange(num_columns, device=start.device)
    moments = Moments.empty(num_columns, True, start.device, out)
    inputs = [block.inputs(number) for number in range(len(residual))]
    for missing, (tokens, x) in zip(residual, inputs, strict=True):
        moments.update(x, missing[tokens] + x @ (present - start).T)
    if not ranks.sum_(moments).count:
        return

    ridge = prior * num_columns / moments.count
    fitted = least_squares(start, None, moments, columns, ridge)[0]
    write_consumer_(model, block.axis, columns, fitted, bias)
    change = read_consumer(model, block.axis)[0] - present
    for missing, (tokens, x) in zip(residual, inputs, strict=True):
        missing.index_add_(0, tokens, x @ change.T, alpha=-1)


class ExpertRefit:
    """Fits the kept experts of a layer, and its shared experts, to the outputs of all experts.

    The target is the output of the dense experts for the present inputs. If the experts' output is added to the
    residual stream, the target also has the part of the accumulated residual error to correct. Fitted outputs are
    multiplied by the gates of the new routing, so a change in the size of the gates is made up for as well. A shared
    expert takes part if its output is added to the residual stream too.

    Args:
        source: The source that runs the layer, which still has its dense weights.
        space: The space of the layer's experts.
        data: The calibration text.
    """

    def __init__(self, source: InMemory | WholeModel, space: Space, data: CalibrationData):
        self.source = source
        self.space = space
        self.data = data
        self.gain = self._gain(str(space.experts))
        self.targets: list[Tensor] = []
        # The energy of each batch stays on the device until all batches have run.
        self._energies: list[Tensor] = []
        self._counts: list[int] = []  # the number of tokens of each batch

    def _gain(self, module: str) -> float | None:
        """Return the factor of a module's output in the layer's output; None where it takes another path."""
        if not isinstance(self.source, InMemory):
            return None
        path = self.source.residual_path(self.space.layer, module)
        return path.factor if isinstance(path, Gain) else None

    def see_dense(self, number: int, routed: Tensor, output: Any) -> None:
        """Record the outputs of all experts for a batch, shape `(tokens, hidden)`."""
        source = self.source
        batch = source.batches[number]
        target = routed.float()
        self._energies.append(target.square().sum(dtype=torch.float64))
        self._counts.append(len(target))
        if self.gain is not None and isinstance(source, InMemory) and source.error_feedback:
            dense = source.dense[number].to(output.device)
            error = batch.counted(source.error_feedback * (dense.float() - output.float()))
            target = target + error / self.gain
        self.targets.append(target)

    def scales(self) -> list[float]:
        """Return the square root of each token's weight by batch; a domain's weight is its share by its energy."""
        batches = self.source.batches
        energy = torch.zeros(self.source.num_domains, dtype=torch.float64)
        count = torch.zeros(self.source.num_domains, dtype=torch.float64)
        energies = torch.stack(self._energies).cpu()
        for batch, own_energy, own_count in zip(batches, energies, self._counts, strict=True):
            energy[batch.domain] += own_energy
            count[batch.domain] += own_count
        all_reduce_([energy, count])

        shares = torch.tensor(self.data.shares).double()
        weights = shares * count / energy.where(energy > 0, torch.inf)
        weights = weights / weights.sum().clamp(min=torch.finfo(weights.dtype).tiny)
        roots = (weights * count.sum() / count.clamp(min=1)).sqrt().tolist()
        return [roots[batch.domain] for batch in batches]

    def fit_(self, num_kept: int) -> None:
        """Refit the layer, which has only `num_kept` experts now."""
        experts = experts_of(self.source, self.space)
        scales = self.scales()
        shared = self._shared()
        residual: list[Tensor] = []
        shared_inputs: dict[str, list[Tensor]] = {axis.module: [] for axis, _ in shared}

        def see(number: int, routed: Tensor, output: Any) -> None:
            residual.append((self.targets[number] - routed.float()) * scales[number])

        def see_shared(module: str, x: Tensor) -> None:
            batch = self.source.batches[len(shared_inputs[module])]
            shared_inputs[module].append(batch.counted(x.detach()))

        with observe(self.source.model, shared_inputs, see_shared):
            calls = route(self.source, self.space, see)
        self.targets = []

        def inputs_of_expert(expert: int, space: Space, number: int) -> tuple[Tensor, Tensor]:
            chosen = calls[number].of(expert)
            weights = chosen.gates * scales[number]
            return chosen.tokens, inner_activations(experts, space, chosen.hidden).float() * weights[:, None]

        def inputs_of_shared(module: str, gain: float, number: int) -> tuple[Tensor, Tensor]:
            x = shared_inputs[module][number].float() * (gain * scales[number])
            return torch.arange(len(x), device=x.device), x

        blocks = [Block(axis, partial(inputs_of_shared, axis.module, gain)) for axis, gain in shared]
        inside = [space for space in self.source.arch.at(self.space.layer) if space.inside and space.experts]
        for expert, space in enumerate(inside[:num_kept]):  # the kept experts are numbered anew
            blocks.append(Block(space.consumers[0], partial(inputs_of_expert, expert, space)))
        refit_blocks_(self.source.model, blocks, residual, self.source.ranks)

    def _shared(self) -> list[tuple[Axis, float]]:
        """Return the consumers of shared experts beside the experts, with their gains relative to the experts'."""
        if self.gain is None:
            return []
        prefix = f"{str(self.space.experts).rpartition('.')[0]}."
        consumers: list[tuple[Axis, float]] = []
        for space in self.source.arch.at(self.space.layer):
            is_shared = space.inside and space.experts is None and space.consumers[0].module.startswith(prefix)
            if not is_shared:
                continue
            gain = self._gain(space.consumers[0].module)
            if gain is not None:
                consumers.append((space.consumers[0], gain / (self.gain or 1.0)))
        return consumers
