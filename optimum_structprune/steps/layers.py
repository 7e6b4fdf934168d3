"""The step that removes whole layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..arch.hooks import adding, observe
from ..arch.inference import outputs_for, random_inputs
from ..arch.load import describe
from ..arch.spec import LAYER, MODEL, ArchSpec, Axis, Widths
from ..config.pruning import REFITS, StructPruneConfig
from ..criteria import criterion_of
from ..method.calibrate import Moments, mixed, output_energy
from ..method.layers import MAX_DEVIATION, Batch, InMemory, equal, noise_like
from ..method.loop import best_units, check_scores
from ..method.plan import Plan
from ..method.refit import ridge_strength
from ..method.resize import drop_layers_
from ..method.shrink import check_same, read_consumer, write_consumer_
from ..system.processes import broadcast_
from .base import RunState, Step
from .data import CalibrationData, source_of


class DropLayers(Step):
    """Remove the layers with the lowest scores, by the configured criterion or else by block influence."""

    def prune_(self, state: RunState, widths: Widths) -> Plan:
        """Prune the model to a number of layers, and return the kept layers."""
        model = state.model
        arch = state.arch
        data = state.data

        with state.report.timed("layers"):
            criterion = criterion_of(state.config.scored_by, LAYER)
            scores_by_domain = []
            for _, batches in groupby(data.own_batches, lambda batch: batch.domain):
                scores = criterion.score(model, arch, list(batches))
                check_scores(scores, arch.num_layers, criterion.name, arch.layer_path)
                scores_by_domain.append(scores)

            scores = broadcast_(data.combined(torch.stack(scores_by_domain)))
            space = arch.of(LAYER)[0]
            scores[list(space.required)] = torch.inf
            keep = best_units(scores, space.width_in(widths))

            state.changed = True
            remove_layers_(model, arch, data, keep)

        return Plan(arch.model_type, {(MODEL, LAYER): keep})


def remove_layers_(model: PreTrainedModel, arch: ArchSpec, data: CalibrationData, keep: Sequence[int]) -> None:
    """Remove all layers except the layers in `keep`. With error feedback, the layer before each gap is refitted."""
    if data.config.feedback_share:
        source = source_of(model, arch, data.own_batches, data.config.feedback_share)
        if isinstance(source, InMemory):
            _refit_before_gaps_(arch, data, keep, source)

    outputs = _few_outputs(model, arch, keep)
    drop_layers_(model, arch, keep)
    shorter_arch = describe(model, data.config.arch_file)
    check_same("The model", outputs, _few_outputs(model, shorter_arch, range(len(keep))))


def _refit_before_gaps_(arch: ArchSpec, data: CalibrationData, keep: Sequence[int], source: InMemory) -> None:
    """Refit the layer before each gap, so that the residual stream after the gap is closer to the original one."""
    # The outputs of a layer may pass through a norm, which error feedback ignores by default.
    source.find_other_path = Norm.after_module

    next_layers = list(keep[1:])
    next_layers.append(arch.num_layers)
    num_passed = 0
    for layer, next_layer in zip(keep, next_layers, strict=True):
        # The original residual stream passes through the removed layers too.
        for original_layer in range(num_passed, next_layer):
            with source.at(original_layer):
                source.advance_original(original_layer, arch.names)
        num_passed = next_layer

        with source.at(layer, changes=True):
            if next_layer > layer + 1:
                _refit_before_gap_(data, layer, source)
            source.advance(layer)


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
    """Refit the last matrix of a layer that writes to the residual stream, to the original stream after the gap.

    ReplaceMe (Shopkhoev et al. 2025, arXiv 2505.02819) inserts a linear map after this matrix instead.
    """
    model = source.model
    writers = []
    for space in source.arch.at(layer):
        if space.experts is None and len(space.consumers) == 1:
            path = source.residual_path(layer, space.consumers[0].module)
            if path:
                writers.append((space, path))
    if not writers:
        return

    space, path = writers[-1]
    axis = space.consumers[0]
    weight, _ = read_consumer(model, axis)
    (moments,) = mixed(source.moments(layer, space, True), data.shares, [weight])
    new_weight = refit_consumer_(model, data.config, axis, moments, torch.arange(weight.shape[1]))

    if isinstance(path, Norm):
        # The norm would undo a change in the size of the outputs, so the weight of the norm is scaled instead.
        energy = output_energy(new_weight, replace(moments, energy=None))
        scale = (energy / output_energy(weight, moments)) ** 0.5
        model.get_parameter(f"{path.module}.weight").data.add_(path.weight, alpha=scale - 1)


def size_of(x: Tensor) -> Tensor:
    """Return the root of the mean square of each token, shape `(..., 1)`, fp32."""
    size = x.float().square().mean(-1, keepdim=True).sqrt()
    return size.clamp(min=torch.finfo(torch.float32).tiny)


def normalised(x: Tensor) -> Tensor:
    """Return tokens divided by their size, fp32. `x` has the shape `(..., channels)`."""
    return x.float() / size_of(x)


class Norm(NamedTuple):
    """A norm between a consumer and the residual stream.

    Error feedback through norms is used before removed layers only. For units inside the layers, it has almost no
    effect.

    Attributes:
        module: The full name of the norm.
        weight: The factors of the norm, shape `(channels,)`.
    """

    module: str
    weight: Tensor

    def to_fit(self, x: Tensor, error: Tensor, product: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the inputs, the error and the product before the norm; see `ResidualPath.to_fit`."""
        assert product is not None

        # The inverse of the weights is damped: the norm suppresses channels with small weights, so their error cannot
        # be corrected before the norm.
        square = self.weight.square()
        error_before_norm = error * self.weight / (square + 0.1 * square.mean())

        # The norm divides each token by the size of the product.
        return x.float() / size_of(product), error_before_norm, normalised(product)

    @classmethod
    @torch.no_grad()
    def after_module(cls, source: InMemory, layer: int, name: str) -> Norm | None:
        """Return the norm that turns a module's output y into w · y / rms(y) and adds it to the residual stream.

        The output is replaced by noise n and by -n. Half of the difference between the two outputs of the layer is
        w · n / rms(n).

        Returns:
            The norm, or None if the output takes another path.
        """
        hidden = source.hidden[0]
        module = source.module(layer)
        norm_names = []
        for path, parameter in module.named_parameters():
            if path.endswith(".weight") and parameter.shape == hidden.shape[-1:]:
                norm_names.append(path.removesuffix(".weight"))

        noise = noise_like(hidden).expand(hidden.shape).to(next(module.parameters()))
        outputs: list[Tensor] = []
        readers: list[str] = []

        def see(norm: str, x: Tensor) -> None:
            if x.numel() == replacement.numel() and equal(x.reshape(replacement.shape), replacement):
                readers.append(norm)

        for replacement in (noise, -noise):
            with adding(module.get_submodule(name), replacement, replace=True), observe(module, norm_names, see):
                outputs.append(source.output(layer, 0)[:1].float())

        change = (outputs[0] - outputs[1]) / 2
        unit = normalised(noise[:1])
        weight = source.ranks.broadcast((change * unit).mean((0, 1)) / unit.square().mean((0, 1)))
        deviation = float(source.ranks.broadcast((change - weight * unit).norm() / change.norm()))

        # The deviation is NaN if the noise does not change the outputs.
        if len(readers) != 2 or not deviation <= MAX_DEVIATION:
            return None
        return cls(f"{source.arch.layer_prefix(layer)}{readers[0]}", weight)


def refit_consumer_(
    model: nn.Module, config: StructPruneConfig, axis: Axis, moments: Moments, columns: Tensor
) -> Tensor:
    """Refit the given columns of a consumer, and set all other columns to zero.

    Returns:
        The new weights of the columns, shape `(out, columns)`.
    """
    weight, bias = read_consumer(model, axis)
    columns = columns.to(weight.device)
    ridge = ridge_strength(config.damping, len(columns), moments.count)

    refit = REFITS.get(config.refit)
    new_weight, new_bias = refit(weight, bias, moments, columns, ridge)
    write_consumer_(model, axis, columns, new_weight, new_bias)
    return new_weight
