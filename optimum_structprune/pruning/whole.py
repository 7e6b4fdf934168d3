"""Steps that remove something from the whole model: layers, experts, channels of the residual stream."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.logging import tqdm

from ..arch.shrink import shrunk_config
from ..arch.spec import HIDDEN, LAYER, MODEL, ArchSpec, Axis, ResidualStream
from ..calibration.accumulator import Accumulator
from ..calibration.linalg import ridge_strength
from ..calibration.passes import LayerPasses
from ..config.pruning import StructPruneConfig
from ..criteria.base import check_scores
from ..criteria.layers import BLOCK_INFLUENCE, LAYER_CRITERIA
from ..criteria.mixture import Mixture
from ..forward.hooks import observe
from ..forward.layers import Batch
from ..forward.metrics import run_model
from ..forward.placement import Placement
from ..surgery.consumers import read_consumer, write_consumer_
from ..surgery.cut import drop_layers_, rebuilding_, shrink_layer_
from ..surgery.plan import Plan, best_units
from ..surgery.refit import REFITS
from ..surgery.resize import narrow_
from ..system.processes import as_first_has_
from .evidence import judges_layers
from .run import Run, Step


def remove_layers_(run: Run, step: Step) -> Plan:
    """Take out the layers that measured losses have chosen, or else those that matter least to the model as it is now.

    The config's criterion counts where it scores whole layers; otherwise block influence does.
    """
    with run.report.timed("layers"):
        keep = _layers_to_keep(run, step) if run.layers is None else run.layers
        run.changed = True
        drop_layers_(run.model, run.arch, keep)
    return Plan(run.arch.model_type, {(MODEL, LAYER): keep})


def _layers_to_keep(run: Run, step: Step) -> tuple[int, ...]:
    name, scores_by_domain = run.config.scored_by if judges_layers(run.config) else BLOCK_INFLUENCE, []
    for _, batches in groupby(run.evidence.own_batches, lambda batch: batch.domain):
        scores_by_domain.append(LAYER_CRITERIA.get(name)().score(run.model, run.arch, list(batches)))
        check_scores(scores_by_domain[-1], run.arch.num_layers, name, run.arch.layer_path)
    scores = as_first_has_(run.evidence.mixture.combined(torch.stack(scores_by_domain)))
    return best_units(scores, run.arch.of(LAYER)[0].width_in(step.widths))


def remove_experts_(run: Run, step: Step) -> Plan:
    """Take whole experts out of every layer, those first that contribute least (REAP, Lasby et al. 2025, eq. 8).

    An expert cannot be masked: a router is a softmax over logits, and no weight makes one of them minus infinity. So
    this is one step before the rounds, and the layers shrink at once.
    """
    with run.report.timed("experts"):
        model, arch, evidence = run.model, run.arch, run.evidence
        passes = evidence.run_passes(model, arch, evidence.own_batches)
        placement, keep = Placement(model, arch), dict[tuple[int, str], tuple[int, ...]]()
        with rebuilding_(model, shrunk_config(model.config, arch, step.widths)) as smaller:
            for layer in tqdm(range(arch.num_layers), desc="experts", unit="layer"):
                with placement.at(layer, changes=True):
                    for space in arch.at(layer):
                        if space.kind in step.widths:
                            scores = evidence.mixture.combined(passes.contributions(layer, space))
                            keep[space.key] = best_units(scores, space.width_in(step.widths))
                    run.changed = True
                    shrink_layer_(model, arch, layer, Plan(arch.model_type, keep), smaller)
                    passes.advance(layer)
    return Plan(arch.model_type, keep)


def remove_channels_(run: Run, step: Step) -> Plan:
    """Take channels out of the residual stream of the whole model.

    Without refit, the result computes what the model would compute if these channels were zero wherever the residual
    stream is read. With `least_squares`, the consumers inside the layers are refitted to what they gave on the dense
    residual stream, and every norm is scaled by the share of the energy that is left.
    """
    with run.report.timed("channels"):
        model, arch, config, evidence = run.model, run.arch, run.config, run.evidence
        assert arch.residual is not None
        width, mixture, batches = arch.of(HIDDEN)[0].width_in(step.widths), evidence.mixture, evidence.own_batches
        energies = channel_energies(model, arch.residual, batches, len(evidence.domains))
        keep = best_units(mixture.combined(energies.mean(0)), width)
        kept_energy = torch.ones(len(arch.residual.reads))
        run.changed = True
        if config.fits:
            mixed = mixture.mean(energies.movedim(1, 0))
            kept_energy = mixed[:, list(keep)].mean(1) * width / arch.residual.space.size
            refit_readers_(model, arch, config, batches, mixture, keep)
        factors = {
            read.tap: float(energy) ** 0.5 for read, energy in zip(arch.residual.reads, kept_energy, strict=True)
        }
        narrow_(model, arch, keep, factors)
    return Plan(arch.model_type, {(MODEL, HIDDEN): keep})


@torch.no_grad()
def channel_energies(
    model: PreTrainedModel, residual: ResidualStream, batches: Sequence[Batch], num_domains: int
) -> Tensor:
    """Mean of x_j² over tokens wherever the residual stream is read, relative to the mean over the token's channels,
    so that tokens and layers count alike whatever the size of their activations. The result has the shape `(reads,
    domains, channels)`; the mean over channels is 1.
    """
    read_at = replace(residual.space, into=tuple(Axis(f"{read.tap}.weight", 1) for read in residual.reads))
    device = next(model.parameters()).device
    accumulators = [Accumulator([read_at], False, domain, device) for domain in range(num_domains)]
    names = [read.tap for read in residual.reads]

    def see(name: str, hidden: Tensor) -> None:
        hidden = hidden.double()
        size = hidden.square().mean(-1, keepdim=True).sqrt()
        present.add(name, hidden / size.clamp(min=torch.finfo(size.dtype).tiny))

    present = accumulators[0]
    with observe(model, names, see):
        for batch in batches:
            present = accumulators[batch.domain]
            present.batch = batch
            run_model(model, batch.ids)
    squares = [torch.stack([moments.square for moments in accumulator.of(read_at)]) for accumulator in accumulators]
    return torch.stack(squares, 1).cpu()


def refit_readers_(
    model: PreTrainedModel,
    arch: ArchSpec,
    config: StructPruneConfig,
    batches: Sequence[Batch],
    mixture: Mixture,
    keep: Sequence[int],
) -> None:
    """Refit whatever reads the residual stream inside the layers to what it gives on the dense residual stream."""
    assert arch.residual is not None
    passes = LayerPasses(model, arch, batches, fixed=True)
    for layer in range(arch.num_layers):
        reads = [read for read in arch.residual.reads if read.layer == layer]
        # All consumers at one place get the same input, so the moments of the first one are those of all.
        spaces = [replace(arch.residual.space, layer=layer, into=read.readers[:1]) for read in reads]
        moments_by_read = [[moments for (moments,) in passes.gather(layer, space, True)] for space in spaces]
        passes.advance(layer)
        for read, moments_by_domain in zip(reads, moments_by_read, strict=True):
            for axis in _matrices(model, read.readers):
                weight, bias = read_consumer(model, axis)
                columns = torch.tensor(keep, device=weight.device)
                # What was seen are the outputs of the first reader alone.
                moments = mixture.pool(weight, (replace(moments, energy=None) for moments in moments_by_domain))
                damping = ridge_strength(config.damping, len(columns), moments.count)
                refitted = REFITS.get(config.refit)(weight, bias, moments, columns, damping)
                write_consumer_(model, axis, columns, *refitted)


def _matrices(model: nn.Module, axes: Sequence[Axis]) -> Iterator[Axis]:
    for axis in axes:
        weight = model.get_parameter(axis.param)
        yield from [axis] if weight.ndim == 2 else (replace(axis, part=part) for part in range(len(weight)))
