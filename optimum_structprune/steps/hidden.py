"""The step that removes channels of the residual stream."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..arch.hooks import observe
from ..arch.spec import HIDDEN, MODEL, ArchSpec, Axis, ResidualStream, Widths
from ..forward.metrics import outputs_for
from ..method.calibrate import Moments, mixed
from ..method.layers import Batch, run_model
from ..method.loop import best_units
from ..method.shrink import check_same, read_consumer
from ..record.plan import Plan
from ..sources.data import CalibrationData, ranks, source_of
from .base import RunState, Step
from .layers import refit_consumer_
from .resize import mask_channels_, narrow_, scaled_norms


class NarrowHidden(Step):
    """Remove channels of the residual stream of the whole model.

    Without refit, the result computes the same as the model with these channels set to zero wherever the residual
    stream is read. With `least_squares`, the consumers inside the layers are refitted to their outputs on the dense
    residual stream, and every norm is scaled by the root of the remaining share of the energy.
    """

    def prune_(self, state: RunState, widths: Widths) -> Plan:
        """Prune the residual stream to its width, and return the kept channels."""
        with state.report.timed("channels"):
            model, arch, data = state.model, state.arch, state.data
            residual = arch.residual
            assert residual is not None

            width = arch.of(HIDDEN)[0].width_in(widths)
            energies = channel_energies(model, residual, data.own_batches, len(data.domains))
            keep = best_units(data.combined(energies.mean(0)), width)

            state.changed = True
            kept_energy = torch.ones(len(residual.reads))
            if state.config.refit == "least_squares":
                mean_energies = data.mean(energies.movedim(1, 0))
                kept_energy = mean_energies[:, list(keep)].mean(1) * width / residual.space.size
                refit_readers_(model, arch, data, keep)
            factors = {
                read.tap: float(energy) ** 0.5 for read, energy in zip(residual.reads, kept_energy, strict=True)
            }

            mask_channels_(model, residual, keep)
            with scaled_norms(model, residual, factors):
                outputs = outputs_for(model)
            narrow_(model, arch, keep, factors)
            check_same("The model", outputs, outputs_for(model))
        return Plan(arch.model_type, {(MODEL, HIDDEN): keep})


@torch.no_grad()
def channel_energies(
    model: PreTrainedModel, residual: ResidualStream, batches: Sequence[Batch], num_domains: int
) -> Tensor:
    """Return the mean of x_j² over tokens at each read of the residual stream, shape `(reads, domains, channels)`.

    Each token is divided by its own mean over channels, so that tokens and layers count alike whatever the size of
    their activations. The mean over channels is 1.
    """
    size = residual.space.size
    taps = [read.tap for read in residual.reads]
    # A spread model reads the stream on several devices, and activations stay where they are.
    first = next(model.parameters())
    devices = [next(model.get_submodule(tap).parameters(), first).device for tap in taps]
    moments = [[Moments.empty(size, device=device) for _ in range(num_domains)] for device in devices]
    batch = batches[0]

    def see(tap: str, hidden: Tensor) -> None:
        hidden = hidden.double()
        norm = hidden.square().mean(-1, keepdim=True).sqrt()
        relative = hidden / norm.clamp(min=torch.finfo(norm.dtype).tiny)
        moments[taps.index(tap)][batch.domain].update(batch.counted(relative))

    with observe(model, taps, see):
        for batch in batches:  # noqa: B007  # `see` reads it
            run_model(model, batch.ids)
    by_read = [
        torch.stack([ranks().sum_(own).checked(tap, domain).square for domain, own in enumerate(by_domain)]).cpu()
        for tap, by_domain in zip(taps, moments, strict=True)
    ]
    return torch.stack(by_read)


def refit_readers_(model: PreTrainedModel, arch: ArchSpec, data: CalibrationData, keep: Sequence[int]) -> None:
    """Refit the readers inside the layers to their outputs on the dense residual stream."""
    assert arch.residual is not None
    source = source_of(model, arch, data.own_batches, fixed=True)
    for layer in range(arch.num_layers):
        reads = [read for read in arch.residual.reads if read.layer == layer]
        # All consumers at one place get the same input, so the moments of the first one are those of all.
        spaces = [replace(arch.residual.space, layer=layer, consumers=read.readers[:1]) for read in reads]
        moments_by_read = [[moments for (moments,) in source.moments(layer, space, True)] for space in spaces]
        source.advance(layer)
        for read, moments_by_domain in zip(reads, moments_by_read, strict=True):
            for axis in _matrices(model, read.readers):
                # All readers share the moments, but the energy is that of the outputs of the first reader.
                own_moments = [
                    [replace(moments, energy=None, gram=moments.full_gram().clone())] for moments in moments_by_domain
                ]
                (moments,) = mixed(own_moments, data.shares, [read_consumer(model, axis)[0]])
                refit_consumer_(model, data.config, axis, moments, torch.tensor(keep))


def _matrices(model: nn.Module, axes: Sequence[Axis]) -> Iterator[Axis]:
    """Yield the axes of matrices. A parameter that stacks the matrices of experts yields one axis per expert."""
    for axis in axes:
        weight = model.get_parameter(axis.param)
        if weight.ndim == 2:
            yield axis
        else:
            for expert in range(len(weight)):
                yield replace(axis, part=expert)
