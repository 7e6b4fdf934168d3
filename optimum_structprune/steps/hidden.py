"""The step that takes channels out of the residual stream."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..arch.hooks import observe
from ..arch.spec import HIDDEN, MODEL, ArchSpec, Axis, ResidualStream
from ..forward.metrics import outputs_for
from ..method.calibrate import Moments, mixed
from ..method.layers import Batch, run_model
from ..method.loop import best_units
from ..method.shrink import check_same, read_consumer
from ..record.plan import Plan
from ..sources.data import CalibrationData, ranks, source_of
from .layers import refit_consumer_
from .resize import mask_channels_, narrow_, scaled_norms


if TYPE_CHECKING:
    from ..pruning.run import Run, Step


def remove_channels_(run: Run, step: Step) -> Plan:
    """Take channels out of the residual stream of the whole model.

    Without refit, the result computes what the model would compute if these channels were zero wherever the residual
    stream is read. With `least_squares`, the consumers inside the layers are refitted to what they gave on the dense
    residual stream, and every norm is scaled by the share of the energy that is left.
    """
    with run.report.timed("channels"):
        model, arch, config, data = run.model, run.arch, run.config, run.data
        assert arch.residual is not None
        width, batches = arch.of(HIDDEN)[0].width_in(step.widths), data.own_batches
        energies = channel_energies(model, arch.residual, batches, len(data.domains))
        keep = best_units(data.combined(energies.mean(0)), width)
        kept_energy = torch.ones(len(arch.residual.reads))
        run.changed = True
        if config.refit == "least_squares":
            mean_energies = data.mean(energies.movedim(1, 0))
            kept_energy = mean_energies[:, list(keep)].mean(1) * width / arch.residual.space.size
            refit_readers_(model, arch, data, keep)
        factors = {read.tap: float(kept) ** 0.5 for read, kept in zip(arch.residual.reads, kept_energy, strict=True)}
        mask_channels_(model, arch.residual, keep)
        with scaled_norms(model, arch.residual, factors):
            outputs = outputs_for(model)
        narrow_(model, arch, keep, factors)
        check_same("The model", outputs, outputs_for(model))
    return Plan(arch.model_type, {(MODEL, HIDDEN): keep})


@torch.no_grad()
def channel_energies(
    model: PreTrainedModel, residual: ResidualStream, batches: Sequence[Batch], num_domains: int
) -> Tensor:
    """The mean of x_j² over tokens, relative to the token's mean over channels, at each read of the residual stream.

    So tokens and layers count alike, whatever the size of their activations. The result has the shape `(reads,
    domains, channels)`; its mean over channels is 1.
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
        torch.stack([ranks().sum_(one).checked(tap, domain).square for domain, one in enumerate(by_domain)]).cpu()
        for tap, by_domain in zip(taps, moments, strict=True)
    ]
    return torch.stack(by_read)


def refit_readers_(model: PreTrainedModel, arch: ArchSpec, data: CalibrationData, keep: Sequence[int]) -> None:
    """Refit whatever reads the residual stream inside the layers to what it gives on the dense residual stream."""
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
                # What was seen are the outputs of the first reader alone. The moments serve all readers.
                unseen = ([replace(one, energy=None, gram=one.full_gram().clone())] for one in moments_by_domain)
                (moments,) = mixed(unseen, data.shares, [read_consumer(model, axis)[0]])
                refit_consumer_(model, data.config, axis, moments, torch.tensor(keep))


def _matrices(model: nn.Module, axes: Sequence[Axis]) -> Iterator[Axis]:
    for axis in axes:
        weight = model.get_parameter(axis.param)
        yield from [axis] if weight.ndim == 2 else (replace(axis, part=part) for part in range(len(weight)))
