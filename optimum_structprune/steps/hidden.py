"""The step that removes channels of the residual stream."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..arch.hooks import observe
from ..arch.inference import outputs_for
from ..arch.spec import HIDDEN, MODEL, ArchSpec, Axis, ResidualStream, Widths
from ..method.calibrate import Moments, mixed
from ..method.layers import Batch, run_model
from ..method.loop import best_units
from ..method.plan import Plan
from ..method.resize import mask_channels_, narrow_, scaled_norms
from ..method.shrink import check_same, read_consumer
from .base import RunState, Step
from .data import CalibrationData, ranks, source_of
from .layers import refit_consumer_


class NarrowHidden(Step):
    """Remove channels of the residual stream of the whole model.

    Without refit, the result computes the same as the model with these channels set to zero at every read of the
    residual stream. With `least_squares`, the consumers inside the layers are refitted to their outputs on the
    original residual stream, and every norm is scaled by the root of the remaining share of the energy.
    """

    def prune_(self, state: RunState, widths: Widths) -> Plan:
        """Prune the residual stream to its width, and return the kept channels."""
        model = state.model
        arch = state.arch
        data = state.data
        residual = arch.residual
        assert residual is not None

        with state.report.timed("channels"):
            width = arch.of(HIDDEN)[0].width_in(widths)
            energies = channel_energies(model, residual, data.own_batches, len(data.domains))
            keep = best_units(data.combined(energies.mean(0)), width)

            state.changed = True
            kept_energy = torch.ones(len(residual.reads))
            if state.config.refit == "least_squares":
                mean_energies = data.mean(energies.movedim(1, 0))
                kept_energy = mean_energies[:, list(keep)].mean(1) * width / residual.space.size
                refit_readers_(model, arch, data, keep)

            factors = {}
            for place, energy in zip(residual.reads, kept_energy, strict=True):
                factors[place.tap] = float(energy) ** 0.5

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
    """Return the mean energy x_j² of each channel over tokens, at each read of the residual stream.

    Each token is divided by its own mean over channels, so that the size of activations does not weight tokens or
    layers. The mean over channels is 1.

    Returns:
        The mean energies, shape `(reads, domains, channels)`.
    """
    size = residual.space.size
    default = next(model.parameters())

    # A model may be spread over several devices. The moments are on the device of the activations.
    moments: dict[str, list[Moments]] = {}
    for place in residual.reads:
        device = next(model.get_submodule(place.tap).parameters(), default).device
        moments[place.tap] = [Moments.empty(size, device=device) for _ in range(num_domains)]

    batch = batches[0]

    def see(tap: str, hidden: Tensor) -> None:
        hidden = hidden.double()
        norm = hidden.square().mean(-1, keepdim=True).sqrt()
        relative = hidden / norm.clamp(min=torch.finfo(norm.dtype).tiny)
        moments[tap][batch.domain].update(batch.counted(relative))

    with observe(model, moments, see):
        for batch in batches:  # noqa: B007  # `see` uses the batch
            run_model(model, batch.ids)

    energies = []
    for tap, moments_by_domain in moments.items():
        squares = []
        for domain, domain_moments in enumerate(moments_by_domain):
            squares.append(ranks().sum_(domain_moments).checked(tap, domain).square)
        energies.append(torch.stack(squares).cpu())
    return torch.stack(energies)


def refit_readers_(model: PreTrainedModel, arch: ArchSpec, data: CalibrationData, keep: Sequence[int]) -> None:
    """Refit the readers inside the layers to their outputs on the original residual stream."""
    assert arch.residual is not None
    source = source_of(model, arch, data.own_batches, fixed=True)
    columns = torch.tensor(keep)

    for layer in range(arch.num_layers):
        places = [place for place in arch.residual.reads if place.layer == layer]

        # All readers at one place get the same input, so the moments of the first reader serve all of them.
        moments_by_place = []
        for place in places:
            space = replace(arch.residual.space, layer=layer, consumers=place.readers[:1])
            moments_by_place.append([moments for (moments,) in source.moments(layer, space, True)])
        source.advance(layer)

        for place, moments_by_domain in zip(places, moments_by_place, strict=True):
            for axis in _matrices(model, place.readers):
                # The energy belongs to the outputs of the first reader alone, so it is left out.
                reader_moments = []
                for moments in moments_by_domain:
                    reader_moments.append([replace(moments, energy=None, gram=moments.full_gram().clone())])

                weight, _ = read_consumer(model, axis)
                (moments,) = mixed(reader_moments, data.shares, [weight])
                refit_consumer_(model, data.config, axis, moments, columns)


def _matrices(model: nn.Module, axes: Sequence[Axis]) -> Iterator[Axis]:
    """Yield the axes of matrices. A parameter that stacks the matrices of experts yields one axis per expert."""
    for axis in axes:
        weight = model.get_parameter(axis.param)
        if weight.ndim == 2:
            yield axis
        else:
            for expert in range(len(weight)):
                yield replace(axis, part=expert)
