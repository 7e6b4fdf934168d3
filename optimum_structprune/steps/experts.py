"""The step that removes whole experts, and refits the kept experts to the outputs of all experts."""

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
from ..method.expert_source import contributions, experts_of, inner_activations, route
from ..method.layers import Gain, InMemory, OneProcess
from ..method.loop import Criterion, best_units
from ..method.plan import Plan
from ..method.refit import least_squares
from ..method.resize import rebuilding_
from ..method.shrink import read_consumer, shrink_layer_, write_consumer_
from ..method.whole_model import WholeModel
from ..system.processes import all_reduce_
from ..system.stages import progress
from .base import RunState, Step
from .data import CalibrationData, source_of


class DropExperts(Step):
    """Remove the experts with the smallest contributions from every layer, and refit the kept experts.

    An expert cannot be masked, because no router weight makes its logit minus infinity. Therefore this step runs
    before the rounds of `ShrinkLayers`, and removes the experts of a layer immediately.
    """

    def prune_(self, state: RunState, widths: Widths) -> Plan:
        """Prune every layer to a number of experts, and return the kept experts."""
        model = state.model
        arch = state.arch
        keep: dict[tuple[int, str], tuple[int, ...]] = {}

        with state.report.timed("experts"):
            criterion = criterion_of(state.config.scored_by, EXPERT)
            source = source_of(model, arch, state.data.own_batches, state.config.feedback_share)

            with rebuilding_(model, shrunk_config(model.config, arch, widths)) as smaller:
                for layer in progress(range(arch.num_layers), desc="Removing experts", unit="layer"):
                    with source.at(layer, changes=True):
                        source.advance_original(layer, widths)
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
    """Remove experts from one layer, add the kept experts to `keep`, and refit them."""
    spaces = [space for space in state.arch.at(layer) if space.kind in widths]
    refits: dict[tuple[int, str], ExpertRefit] = {}
    if state.config.refit == "least_squares":
        refits = {space.key: ExpertRefit(source, space, state.data) for space in spaces}

    for space in spaces:
        see = None
        if refits:
            see = refits[space.key].see_original
        scores = state.data.combined(contributions(source, space, criterion, see))
        keep[space.key] = best_units(scores, space.width_in(widths))

    state.changed = True
    shrink_layer_(state.model, state.arch, layer, keep, smaller)
    for key, refit in refits.items():
        refit.fit_(len(keep[key]))


class Block(NamedTuple):
    """One of several consumers whose outputs are added.

    Attributes:
        axis: The axis of the consumer.
        inputs: A function from the number of a call to the indices of the tokens that the consumer reads, shape
            `(n,)`, and to its inputs for these tokens, shape `(n, columns)`.
    """

    axis: Axis
    inputs: Callable[[int], tuple[Tensor, Tensor]]


@torch.no_grad()
def refit_blocks_(
    model: Any, blocks: list[Block], residual: list[Tensor], ranks: OneProcess, prior: float = 2, sweeps: int = 3
) -> None:
    """Refit the weights of several consumers, so that the change of their summed outputs approximates a residual.

    This is block coordinate descent. Each consumer in turn is fitted to the current residual. Only the inputs and the
    Gram matrix of one consumer are in memory at a time.

    Args:
        model: The model with the consumers, whose weights change.
        blocks: The consumers.
        residual: The missing output by call, shape `(tokens, out)`, fp32. The change of the output is subtracted.
        ranks: The processes that share the calls.
        prior: The ridge pulls toward the original weights, as if they were fitted to `prior` tokens for each column.
        sweeps: The number of times that each consumer is fitted.
    """
    original_weights = [read_consumer(model, block.axis, dtype=None)[0].cpu() for block in blocks]
    for _ in range(sweeps):
        for block, original_weight in zip(blocks, original_weights, strict=True):
            _refit_block_(model, block, original_weight, residual, ranks, prior)


def _refit_block_(
    model: Any, block: Block, original_weight: Tensor, residual: list[Tensor], ranks: OneProcess, prior: float
) -> None:
    """Refit one consumer to the current residual, and subtract the change of its output; see `refit_blocks_`."""
    weight, bias = read_consumer(model, block.axis)
    original_weight = original_weight.to(weight.device).float()
    num_outputs, num_columns = original_weight.shape

    moments = Moments.empty(num_columns, True, weight.device, num_outputs)
    inputs = [block.inputs(number) for number in range(len(residual))]
    for missing_output, (tokens, x) in zip(residual, inputs, strict=True):
        # The fit starts from the original weights, so the target includes the change since then.
        moments.update(x, missing_output[tokens] + x @ (weight - original_weight).T)
    if not ranks.sum_(moments).count:
        return

    ridge = prior * num_columns / moments.count
    columns = torch.arange(num_columns, device=weight.device)
    new_weight, _ = least_squares(original_weight, None, moments, columns, ridge)
    write_consumer_(model, block.axis, columns, new_weight, bias)

    # The weights are read again, because writing rounds them to the dtype of the model.
    change = read_consumer(model, block.axis)[0] - weight
    for missing_output, (tokens, x) in zip(residual, inputs, strict=True):
        missing_output.index_add_(0, tokens, x @ change.T, alpha=-1)


class ExpertRefit:
    """Refit the kept experts and the shared experts of a layer to the outputs of all experts.

    The target is the output of the original experts for the current inputs. If the experts' output is added to the
    residual stream, the target also contains a share of the accumulated error of the residual stream. Fitted outputs
    are multiplied by the gates of the new routing, so the fit also corrects a change in the size of the gates. A
    shared expert is fitted too if its output is added to the residual stream.

    Args:
        source: The source that runs the layer, which still has its original weights.
        space: The space of the layer's experts.
        data: The calibration text.
    """

    def __init__(self, source: InMemory | WholeModel, space: Space, data: CalibrationData):
        self.source = source
        self.space = space
        self.data = data
        self.gain = self._gain(str(space.experts))
        self.targets: list[Tensor] = []
        # The energy and the number of tokens of each batch. The energies remain on the device until all batches have
        # run.
        self._energies: list[Tensor] = []
        self._counts: list[int] = []

    def _gain(self, module: str) -> float | None:
        """Return the factor of a module's output in the layer's output, or None if it takes another path."""
        if not isinstance(self.source, InMemory):
            return None

        path = self.source.residual_path(self.space.layer, module)
        if not isinstance(path, Gain):
            return None
        return path.factor

    def see_original(self, number: int, routed: Tensor, output: Any) -> None:
        """Record the outputs of all experts for a batch, shape `(tokens, hidden)`."""
        source = self.source
        batch = source.batches[number]
        target = routed.float()
        self._energies.append(target.square().sum(dtype=torch.float64))
        self._counts.append(len(target))

        if self.gain is not None and isinstance(source, InMemory) and source.error_feedback:
            original = source.original[number].to(output.device)
            error = batch.counted(source.error_feedback * (original.float() - output.float()))
            target = target + error / self.gain

        self.targets.append(target)

    def scales(self) -> list[float]:
        """Return the square root of a token's weight for each batch.

        The weight of a domain is its share divided by its mean energy.
        """
        batches = self.source.batches
        energy = torch.zeros(self.source.num_domains, dtype=torch.float64)
        count = torch.zeros(self.source.num_domains, dtype=torch.float64)
        batch_energies = torch.stack(self._energies).cpu()
        for batch, batch_energy, batch_count in zip(batches, batch_energies, self._counts, strict=True):
            energy[batch.domain] += batch_energy
            count[batch.domain] += batch_count
        all_reduce_([energy, count])

        shares = torch.tensor(self.data.shares).double()
        weights = shares * count / energy.where(energy > 0, torch.inf)
        weights = weights / weights.sum().clamp(min=torch.finfo(weights.dtype).tiny)
        roots = (weights * count.sum() / count.clamp(min=1)).sqrt().tolist()
        return [roots[batch.domain] for batch in batches]

    def fit_(self, num_kept: int) -> None:
        """Refit the layer, which now has only `num_kept` experts."""
        experts = experts_of(self.source, self.space)
        scales = self.scales()
        shared_consumers = self._shared_consumers()
        residual: list[Tensor] = []
        shared_inputs: dict[str, list[Tensor]] = {axis.module: [] for axis, _ in shared_consumers}

        def see(number: int, routed: Tensor, output: Any) -> None:
            residual.append((self.targets[number] - routed.float()) * scales[number])

        def see_shared(module: str, x: Tensor) -> None:
            batch = self.source.batches[len(shared_inputs[module])]
            shared_inputs[module].append(batch.counted(x.detach()))

        with observe(self.source.model, shared_inputs, see_shared):
            calls = route(self.source, self.space, see)
        self.targets = []

        def inputs_of_expert(expert: int, space: Space, number: int) -> tuple[Tensor, Tensor]:
            routed = calls[number].of(expert)
            weights = routed.gates * scales[number]
            activations = inner_activations(experts, space, routed.hidden).float()
            return routed.tokens, activations * weights[:, None]

        def inputs_of_shared(module: str, gain: float, number: int) -> tuple[Tensor, Tensor]:
            x = shared_inputs[module][number].float() * (gain * scales[number])
            return torch.arange(len(x), device=x.device), x

        blocks = []
        for axis, gain in shared_consumers:
            blocks.append(Block(axis, partial(inputs_of_shared, axis.module, gain)))

        # The kept experts were renumbered from 0.
        expert_spaces = [space for space in self.source.arch.at(self.space.layer) if space.inside and space.experts]
        for expert, space in enumerate(expert_spaces[:num_kept]):
            blocks.append(Block(space.consumers[0], partial(inputs_of_expert, expert, space)))

        refit_blocks_(self.source.model, blocks, residual, self.source.ranks)

    def _shared_consumers(self) -> list[tuple[Axis, float]]:
        """Return the consumers of the layer's shared experts, with their gains relative to the routed experts."""
        if self.gain is None:
            return []

        # A shared expert is in the same module as the routed experts.
        prefix = f"{str(self.space.experts).rpartition('.')[0]}."
        consumers: list[tuple[Axis, float]] = []
        for space in self.source.arch.at(self.space.layer):
            if not space.inside or space.experts is not None:
                continue

            axis = space.consumers[0]
            if not axis.module.startswith(prefix):
                continue
            gain = self._gain(axis.module)
            if gain is not None:
                consumers.append((axis, gain / (self.gain or 1.0)))

        return consumers
