"""The step that removes whole layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby, pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..arch.hooks import adding, observe
from ..arch.load import describe
from ..arch.spec import LAYER, MODEL, ArchSpec, Axis, Widths
from ..config.pruning import REFITS, StructPruneConfig
from ..criteria import criterion_of
from ..forward.metrics import outputs_for, random_inputs
from ..method.calibrate import Moments, mixed, output_energy
from ..method.layers import MAX_DEVIATION, Batch, InMemory, equal, noise_like
from ..method.loop import best_units, check_scores
from ..method.refit import ridge_strength
from ..method.shrink import check_same, read_consumer, write_consumer_
from ..record.plan import Plan
from ..sources.data import CalibrationData, source_of
from ..system.processes import broadcast_
from .base import RunState, Step
from .resize import drop_layers_


class DropLayers(Step):
    """Remove the layers with the lowest scores, by the config's criterion for layers or block influence."""

    def prune_(self, state: RunState, widths: Widths) -> Plan:
        """Prune the model to a number of layers, and return the kept layers."""
        model, arch, data = state.model, state.arch, state.data
        with state.report.timed("layers"):
            criterion = criterion_of(state.config.scored_by, LAYER)
            scores_by_domain = []
            for _, batches in groupby(data.own_batches, lambda batch: batch.domain):
                scores = criterion.score(model, arch, list(batches))
                check_scores(scores, arch.num_layers, criterion.name, arch.layer_path)
                scores_by_domain.append(scores)
            scores = broadcast_(data.combined(torch.stack(scores_by_domain)))
            keep = best_units(scores, arch.of(LAYER)[0].width_in(widths))

            state.changed = True
            remove_layers_(model, arch, data, keep)
        return Plan(arch.model_type, {(MODEL, LAYER): keep})


def remove_layers_(model: PreTrainedModel, arch: ArchSpec, data: CalibrationData, keep: Sequence[int]) -> None:
    """Remove all layers but those in `keep`. With error feedback, the layer before each gap is refitted."""
    share = data.config.feedback_share
    source = source_of(model, arch, data.own_batches, share) if share else None
    if isinstance(source, InMemory):
        source.find_other_path = Norm.behind  # else a layer that normalises its outputs could make up for nothing
        reached = 0
        for layer, behind in pairwise((*keep, arch.num_layers)):
            for other in range(reached, behind):
                with source.at(other):
                    source.advance_dense(other, arch.names)
            reached = behind
            with source.at(layer, changes=True):
                if behind > layer + 1:
                    _refit_before_gap_(data, layer, source)
                source.advance(layer)
    before = _few_outputs(model, arch, keep)
    drop_layers_(model, arch, keep)
    shorter = describe(model, data.config.arch_file)
    check_same("The model", before, _few_outputs(model, shorter, range(len(keep))))


def _few_outputs(model: PreTrainedModel, arch: ArchSpec, layers: Sequence[int]) -> Tensor:
    """Return the outputs of some layers on a few tokens, or of the whole model if layers cannot run alone."""
    source = source_of(model, arch, [Batch(0, random_inputs(model))])
    if not isinstance(source, InMemory):
        return outputs_for(model)
    hidden = source.hidden[0]
    for layer in layers:
        with source.at(layer):
            hidden = source.output(layer, 0, hidden)
    return hidden


def _refit_before_gap_(data: CalibrationData, layer: int, source: InMemory) -> None:
    """Refit the last matrix of a layer that writes to the residual stream, to the dense residual stream after the gap.

    ReplaceMe (Shopkhoev et al. 2025, arXiv 2505.02819) inserts a linear map after this matrix instead.
    """
    model = source.model
    paths = []
    for space in source.arch.at(layer):
        if space.experts is None and len(space.consumers) == 1:
            path = source.residual_path(layer, space.consumers[0].module)
            if path:
                paths.append((space, path))
    if not paths:
        return

    space, path = paths[-1]
    axis = space.consumers[0]
    weight, _ = read_consumer(model, axis)
    (moments,) = mixed(source.moments(layer, space, True), data.shares, [weight])
    refitted = refit_consumer_(model, data.config, axis, moments, torch.arange(weight.shape[1]))
    if isinstance(path, Norm):
        # The norm would undo a change in the size of the outputs, so its weight takes it over.
        energy = output_energy(refitted, replace(moments, energy=None))
        size = (energy / output_energy(weight, moments)) ** 0.5
        model.get_parameter(f"{path.module}.weight").data.add_(path.weight, alpha=size - 1)


def size_of(x: Tensor) -> Tensor:
    """Return the root of the mean square of each token, shape `(..., 1)`, fp32."""
    return x.float().square().mean(-1, keepdim=True).sqrt().clamp(min=torch.finfo(torch.float32).tiny)


def normalised(x: Tensor) -> Tensor:
    """Return tokens divided by their size, fp32. `x` has the shape `(..., channels)`."""
    return x.float() / size_of(x)


class Norm(NamedTuple):
    """A norm between a consumer and the residual stream: its full name, and its factors, shape `(channels,)`. For
    units inside the layers, error feedback through norms brings next to nothing.
    """

    module: str
    weight: Tensor

    def to_fit(self, x: Tensor, error: Tensor, product: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """See `ResidualPath.to_fit`; what hardly comes through the norm is left out."""
        assert product is not None
        square = self.weight.square()
        # The norm divides by the size of the product, so that is what an error of a token is relative to.
        # A channel whose factor is a tenth of the mean comes through a norm too little to be fitted.
        before = error * self.weight / (square + 0.1 * square.mean())
        return x.float() / size_of(product), before, normalised(product)

    @classmethod
    @torch.no_grad()
    def behind(cls, source: InMemory, layer: int, name: str) -> Norm | None:
        """The norm that makes w · y / rms(y) of a module's output y and adds it to the residual stream, or None.
        What it makes of noise in the place of y is half of the difference to what it makes of its negative.
        """
        hidden, module = source.hidden[0], source.module(layer)
        vectors = [path for path, parameter in module.named_parameters() if parameter.shape == hidden.shape[-1:]]
        may = [vector.removesuffix(".weight") for vector in vectors if vector.endswith(".weight")]
        noise = noise_like(hidden).expand(hidden.shape).to(next(module.parameters()))
        outputs: list[Tensor] = []
        behind: list[str] = []

        def see(norm: str, x: Tensor) -> None:
            if x.numel() == given.numel() and equal(x.reshape(given.shape), given):
                behind.append(norm)

        for given in (noise, -noise):
            with adding(module.get_submodule(name), given, replace=True), observe(module, may, see):
                outputs.append(source.output(layer, 0)[:1].float())
        change, unit = (outputs[0] - outputs[1]) / 2, normalised(noise[:1])
        weight = source.ranks.broadcast((change * unit).mean((0, 1)) / unit.square().mean((0, 1)))
        deviation = float(source.ranks.broadcast((change - weight * unit).norm() / change.norm()))
        if len(behind) != 2 or not deviation <= MAX_DEVIATION:  # NaN where nothing comes through
            return None
        return cls(f"{source.arch.layer_prefix(layer)}{behind[0]}", weight)


def refit_consumer_(
    model: nn.Module, config: StructPruneConfig, axis: Axis, moments: Moments, columns: Tensor
) -> Tensor:
    """Refit some columns of a consumer, set all others to zero, and return the former, shape `(out, columns)`."""
    weight, bias = read_consumer(model, axis)
    columns = columns.to(weight.device)
    ridge = ridge_strength(config.damping, len(columns), moments.count)
    refitted = REFITS.get(config.refit)(weight, bias, moments, columns, ridge)
    write_consumer_(model, axis, columns, *refitted)
    return refitted[0]
