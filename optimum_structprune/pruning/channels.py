"""The space `hidden`: channels of the residual stream go, in the whole model at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..arch.spec import HIDDEN, MODEL, ArchSpec, Axis, ResidualStream
from ..calibration.sequential import LayerPasses
from ..calibration.tally import Batch, Tally
from ..config.pruning import StructPruneConfig
from ..criteria.mixture import Mixture
from ..forward.hooks import observe
from ..forward.metrics import run_model
from ..surgery.consumers import read_consumer, write_consumer_
from ..surgery.plan import Plan
from ..surgery.refit import REFITS
from ..surgery.residual import narrow_


if TYPE_CHECKING:
    from transformers import PreTrainedModel


def remove_channels_(
    model: PreTrainedModel,
    arch: ArchSpec,
    config: StructPruneConfig,
    batches: Sequence[Batch],
    mixture: Mixture,
    width: int,
) -> Plan:
    """Take channels out of the residual stream, in one step.

    Without refit, the result computes what the model would compute if these channels were zero wherever the stream is
    read. With `least_squares`, whatever reads the stream inside the layers is refitted to what it gave on the dense
    stream, and every norm is scaled by the share of the energy that is left.

    Args:
        model: The model that is changed, in eval mode.
        arch: Its description.
        config: How to prune.
        batches: Calibration text.
        mixture: How the evidence of the domains is brought together.
        width: Number of channels to keep.
    """
    assert arch.residual is not None
    energies = channel_energies(model, arch.residual, batches, len(mixture.shares))
    scores = mixture.judge_experts(energies.mean(0))
    keep = tuple(sorted(scores.topk(width).indices.tolist()))
    left = torch.ones(len(arch.residual.reads))
    if config.fits:
        mixed = torch.tensor(mixture.shares, dtype=energies.dtype) @ energies.movedim(1, 0).flatten(1)
        left = mixed.view(len(left), -1)[:, list(keep)].mean(1) * width / arch.residual.space.size
        refit_readers_(model, arch, config, batches, mixture, keep)
    factors = {read.tap: float(share) ** 0.5 for read, share in zip(arch.residual.reads, left, strict=True)}
    narrow_(model, arch, keep, factors)
    return Plan(arch.model_type, {(MODEL, HIDDEN): keep})


@torch.no_grad()
def channel_energies(
    model: PreTrainedModel, stream: ResidualStream, batches: Sequence[Batch], num_domains: int
) -> Tensor:
    """Mean of x_j² over tokens wherever the stream is read, relative to the mean over the token's channels, so that
    neither a loud token nor a late layer drowns the others.

    Args:
        model: The model.
        stream: Its residual stream.
        batches: Calibration text.
        num_domains: Number of domains.

    Returns:
        Shape `(reads, domains, channels)`; the mean over channels is 1.
    """
    taps = replace(stream.space, into=tuple(Axis(f"{read.tap}.weight", 1) for read in stream.reads))
    tally = Tally([taps], False, num_domains, next(model.parameters()).device)
    names = [read.tap for read in stream.reads]

    def see(name: str, hidden: Tensor) -> None:
        hidden = hidden.double()
        size = hidden.square().mean(-1, keepdim=True).sqrt()
        tally.see(name, hidden / size.clamp(min=torch.finfo(size.dtype).tiny))

    with observe(model, names, see):
        for batch in batches:
            tally.batch = batch
            run_model(model, batch.ids)
    return torch.stack([torch.stack([part.square for part in parts]) for parts in tally.of(taps)]).cpu()


def refit_readers_(
    model: PreTrainedModel,
    arch: ArchSpec,
    config: StructPruneConfig,
    batches: Sequence[Batch],
    mixture: Mixture,
    keep: Sequence[int],
) -> None:
    """Refit whatever reads the stream inside the layers on what it reads of the dense stream.

    Args:
        model: The model that is changed.
        arch: Its description.
        config: How to prune.
        batches: Calibration text.
        mixture: How the evidence of the domains is brought together.
        keep: Channels that stay.
    """
    assert arch.residual is not None
    passes = LayerPasses(model, arch, batches)
    for layer in range(arch.num_layers):
        here = [read for read in arch.residual.reads if read.layer == layer]
        # All readers at one place get the same input, so that of the first one stands for all.
        taps = [replace(arch.residual.space, layer=layer, into=read.readers[:1]) for read in here]
        found = [passes.gather(layer, tap, True)[0] for tap in taps]
        passes.advance(layer)
        for read, parts in zip(here, found, strict=True):
            for axis in _matrices(model, read.readers):
                weight, bias = read_consumer(model, axis)
                columns = torch.tensor(keep, device=weight.device)
                moments = mixture.pool(weight, parts)
                damping = float(config.damping)
                write_consumer_(model, axis, columns, *REFITS[config.refit](weight, bias, moments, columns, damping))


def _matrices(model: nn.Module, axes: Sequence[Axis]) -> Iterator[Axis]:
    for axis in axes:
        weight = model.get_parameter(axis.param)
        yield from [axis] if weight.ndim == 2 else (replace(axis, part=part) for part in range(len(weight)))
