"""Steps that remove something from the whole model: layers, experts, channels of the residual stream."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby, pairwise

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.logging import tqdm

from ..arch.load import describe
from ..arch.shrink import shrunk_config
from ..arch.spec import HIDDEN, LAYER, MODEL, ArchSpec, Axis, ResidualStream, Space
from ..calibration.accumulator import Accumulator, Norm
from ..calibration.linalg import ridge_strength
from ..calibration.mixture import Mixture, Pool, output_energy, pooled
from ..calibration.moments import Moments
from ..calibration.passes import LayerPasses
from ..config.pruning import StructPruneConfig
from ..criteria.base import check_scores
from ..criteria.layers import BLOCK_INFLUENCE, LAYER_CRITERIA
from ..forward.hooks import observe
from ..forward.layers import Batch
from ..forward.metrics import run_model
from ..forward.placement import Placement
from ..forward.same import check_same, outputs_for, outputs_of_layers
from ..surgery.consumers import read_consumer, write_consumer_
from ..surgery.cut import drop_layers_, rebuilding_, shrink_layer_
from ..surgery.plan import Plan, best_units
from ..surgery.refit import REFITS
from ..surgery.resize import mask_channels_, narrow_, scaled_norms
from ..system.processes import as_first_has_
from .evidence import Evidence, judges_layers
from .run import Run, Step


def remove_layers_(run: Run, step: Step) -> Plan:
    """Take out the layers that measured losses have chosen, or else those that matter least to the model as it is now.

    The config's criterion counts where it scores whole layers; otherwise block influence does.
    """
    with run.report.timed("layers"):
        keep = _layers_to_keep(run, step) if run.layers is None else run.layers
        run.changed = True
        take_out_layers_(run.model, run.arch, run.evidence, keep)
    return Plan(run.arch.model_type, {(MODEL, LAYER): keep})


def _layers_to_keep(run: Run, step: Step) -> tuple[int, ...]:
    name, scores_by_domain = run.config.scored_by if judges_layers(run.config) else BLOCK_INFLUENCE, []
    criterion = LAYER_CRITERIA.get(name)()
    for _, batches in groupby(run.evidence.own_batches, lambda batch: batch.domain):
        scores_by_domain.append(criterion.score(run.model, run.arch, list(batches)))
        check_scores(scores_by_domain[-1], run.arch.num_layers, name, run.arch.layer_path)
    scores = as_first_has_(run.evidence.mixture.combined(torch.stack(scores_by_domain)))
    return best_units(scores, run.arch.of(LAYER)[0].width_in(step.widths))


def take_out_layers_(model: PreTrainedModel, arch: ArchSpec, evidence: Evidence, keep: Sequence[int]) -> None:
    """Remove layers; with error feedback, the layer in front of each gap makes up for it."""
    passes, placement, reached = gap_passes(model, arch, evidence), Placement(model, arch), 0
    if passes is not None:
        for layer, behind in pairwise((*keep, arch.num_layers)):
            for other in range(reached, behind):
                with placement.at(other):
                    passes.advance_dense(other, arch.names)
            reached = behind
            with placement.at(layer, changes=True):
                if behind > layer + 1:
                    refit_before_gap_(model, arch, evidence, layer, passes)
                passes.advance(layer)
    outputs = outputs_of_layers(model, arch)(keep)
    drop_layers_(model, arch, keep)
    shorter = outputs_of_layers(model, describe(model, evidence.config.arch_file))(range(len(keep)))
    check_same("The model", outputs, shorter)


def gap_passes(model: PreTrainedModel, arch: ArchSpec, evidence: Evidence) -> LayerPasses | None:
    """Passes for `refit_before_gap_`; None where nothing makes up for a removed layer."""
    feedback = float(evidence.config.error_feedback) if evidence.config.fits else 0.0
    passes = evidence.run_passes(model, arch, evidence.own_batches, feedback) if feedback else None
    if not isinstance(passes, LayerPasses):
        return None
    passes.through_norms = True  # else a layer that normalises its outputs could make up for nothing
    return passes


def refit_before_gap_(
    model: PreTrainedModel, arch: ArchSpec, evidence: Evidence, layer: int, passes: LayerPasses
) -> None:
    """Refit the last matrix of a layer that writes to the residual stream to the dense stream that the passes have
    reached, behind the gap, as in ReplaceMe (Shopkhoev et al. 2025, arXiv 2505.02819), which fits a map of what the
    matrix gives.
    """
    space, way = _last_writer(arch, layer, passes)
    if space is None:
        return
    (axis,), weight = space.into, read_consumer(model, space.into[0])[0]
    moments = pooled(passes, space, True, [Pool(evidence.mixture, weight)])[0]
    refitted = _refit_(model, evidence.config, axis, moments, torch.arange(weight.shape[1]))
    if isinstance(way, Norm):  # which would make the outputs as large as they were
        energy = output_energy(refitted, replace(moments, energy=None))
        size = (energy / output_energy(weight, moments)) ** 0.5
        model.get_parameter(f"{way.module}.weight").data.add_(way.weight, alpha=size - 1)


def _last_writer(arch: ArchSpec, layer: int, passes: LayerPasses) -> tuple[Space | None, float | Norm | None]:
    """The last space of a layer whose only consumer writes to the residual stream, and by which `way`, if any does."""
    for space in reversed([*arch.at(layer)]):
        if space.experts is None and len(space.into) == 1:
            way = passes.way(layer, space.into[0].module.removeprefix(arch.layer_prefix(layer)))
            if way:
                return space, way
    return None, None


def _refit_(model: nn.Module, config: StructPruneConfig, axis: Axis, moments: Moments, columns: Tensor) -> Tensor:
    """Give a consumer refitted columns and zeros elsewhere, and return the columns, shape `(out, columns)`."""
    weight, bias = read_consumer(model, axis)
    columns = columns.to(weight.device)
    ridge = ridge_strength(config.damping, len(columns), moments.count)
    refitted = REFITS.get(config.refit)(weight, bias, moments, columns, ridge)
    write_consumer_(model, axis, columns, *refitted)
    return refitted[0]


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
                # What was seen are the outputs of the first reader alone.
                unseen = (replace(moments, energy=None) for moments in moments_by_domain)
                moments = mixture.pool(read_consumer(model, axis)[0], unseen)
                _refit_(model, config, axis, moments, torch.tensor(keep))


def _matrices(model: nn.Module, axes: Sequence[Axis]) -> Iterator[Axis]:
    for axis in axes:
        weight = model.get_parameter(axis.param)
        yield from [axis] if weight.ndim == 2 else (replace(axis, part=part) for part in range(len(weight)))
