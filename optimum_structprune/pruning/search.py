"""The widths that lose least: from measured losses to a few shapes, which short prunings on trial decide between."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import pairwise
from math import inf, isnan
from typing import Any

import torch
from transformers import PreTrainedModel

from ..arch.load import describe
from ..arch.spec import LAYER, ArchSpec, Space, Widths
from ..config.pruning import StructPruneConfig
from ..errors import StructPruneError
from ..forward.metrics import evaluating
from ..record.report import Report
from ..surgery.cut import drop_layers_
from ..system.offloading import is_offloaded
from ..widths.allocation import alike, choices, legal_widths, rungs_of
from ..widths.budget import keeps_to, resources, widths_of
from ..widths.ranking import spaces_by_layer
from ..widths.shapes import Curves, Resource, Shape, searched_shape, uniform_shapes
from .evidence import Evidence
from .known import Key, Known
from .sweep import Sweep
from .trials import PROBE_TOKENS, SHARES, STRIDE, Probe, all_trials, curves_of, tried


# So many uniform shapes are pruned on trial, on so many calibration tokens at most.
FINALISTS = 4
TRIAL_TOKENS = 8192


@dataclass(frozen=True)
class Candidate:
    """A shape that may be taken.

    Attributes:
        name: What has proposed it.
        shape: The shape.
        predicted: The loss that measured losses of single layers add up to; None where nothing predicts it.
    """

    name: str
    shape: Shape
    predicted: float | None = None


def search(
    model: PreTrainedModel, arch: ArchSpec, config: StructPruneConfig, evidence: Evidence, report: Report
) -> Shape:
    """The shape that loses least of those that remove as much as a config says.

    Every layer in turn gives up a quarter and three quarters of each space, with the refit of the config, and for
    `search` and `search_uniform` itself as a whole, while all others are dense. The loss is KL(dense‖model) on
    held-out text. An integer program finds the shape of least total loss; it and the shape without measured losses are
    then pruned on trial, all layers together, and the better one is taken.
    """
    plain = widths_of(replace(config, allocation="uniform", objective="mean", losses_dir=None), arch, model)
    with evaluating(model), report.timed("search"):
        layers = offers_layers(config, arch, model)
        probe = Probe.of(model, arch, evidence)
        curves = measured_curves(model, arch, config, evidence, list(plain), layers, probe, report)
        found = candidates(config, arch, model, plain, curves)
        results = _trials(model, arch, config, evidence, found, probe)
    best = min(results, key=lambda pair: pair[0])[1]
    report.shapes = [
        {
            "proposed_by": one.name,
            "widths": one.shape.after_removal(),
            "layers": one.shape.layers,
            "predicted_loss": one.predicted,
            "loss": loss,
            "chosen": one is best,
        }
        for loss, one in results
    ]
    return best.shape


def candidates(
    config: StructPruneConfig, arch: ArchSpec, model: PreTrainedModel, plain: Widths, curves: Curves
) -> list[Candidate]:
    """The shapes that are pruned on trial: those that measured losses speak for, and the one of `uniform`."""
    names = list(plain)
    wanted = resources(config, arch, model, names, bool(curves.layers))
    found = []
    if config.allocation != "search_uniform":
        found += _by_layer(config, arch, model, curves, wanted, plain)
    one_shape = config.allocation != "sensitivity" and config.widths is None and alike(arch, names)
    if one_shape and not config.skip_layers:
        found += _uniform(config, arch, model, names, curves, wanted[0])
    # Where layers differ, a unit may keep more than the mean, of which a wish for cache is made.
    found = [one for one in found if one.shape.layers or keeps_to(config, arch, model, one.shape.widths)]
    found.append(Candidate("one width", Shape(plain)))
    distinct: dict[str, Candidate] = {}
    for one in found:
        distinct.setdefault(repr((one.shape.layers, sorted(one.shape.widths.items()))), one)
    return list(distinct.values())


def offers_layers(config: StructPruneConfig, arch: ArchSpec, model: PreTrainedModel) -> bool:
    """Whether whole layers may go: where `search` or `search_uniform` says how much in all, the layers are alike, and
    nothing else in the config speaks of single layers or of more than one round.
    """
    return (
        config.allocation in ("search", "search_uniform")
        and config.widths is None
        and LAYER in arch.offered
        and alike(arch, arch.names)
        and config.stats is None
        and not config.skip_layers
        and config.rounds == 1
        and config.max_perplexity_ratio is None
        and (config.recovery is None or not config.recovery.every_round)
        and not is_offloaded(model)
    )


def measured_curves(
    model: PreTrainedModel,
    arch: ArchSpec,
    config: StructPruneConfig,
    evidence: Evidence,
    names: Sequence[str],
    layers: bool,
    probe: Probe,
    report: Report,
) -> Curves:
    """The losses of the model by what each layer gives up; what earlier runs have kept is not measured again."""
    # A trial has no errors of earlier layers that error feedback could see, and a bias would stay in the model.
    refit: Any = "none" if config.refit == "bias" else config.refit
    alone = replace(config, error_feedback=0.0, refit=refit)
    spaces: dict[Key, list[Space]] = {
        (layer, name): found
        for name in names
        for layer, found in spaces_by_layer(arch, name).items()
        if layer not in config.skip_layers
    }
    measure = {"shares": SHARES, "tokens": PROBE_TOKENS, "stride": STRIDE}
    evidence = replace(evidence, config=alone)
    known = Known.load(alone, model, evidence, measure)
    keys = tried(arch, spaces, layers)
    if all(key in known.trials for key in keys):
        trials = {key: known.trials[key] for key in keys}
    else:
        trials = all_trials(Sweep(model, arch, alone), spaces, evidence, probe, layers, known)
    for layer, name in spaces:
        found = {units: losses.tolist() for units, losses in trials[layer, name].items()}
        report.details.sensitivity.setdefault(name, {})[layer] = found
    return curves_of(config, arch, spaces, trials, evidence)


def _by_layer(
    config: StructPruneConfig,
    arch: ArchSpec,
    model: PreTrainedModel,
    curves: Curves,
    wanted: Sequence[Resource],
    plain: Widths,
) -> list[Candidate]:
    """The best shape with widths for each layer, with whole layers gone and without, and one halfway to one width,
    since layers that each give up much lose more together than they do one at a time.
    """
    legal = legal_widths(config, arch, model.config)
    spaces = {(space.layer, name): space for name in plain for space in arch.of(name)}
    rungs = {
        key: rungs_of(config, space, legal[key[1]])
        for key, space in spaces.items()
        if key[0] not in config.skip_layers
    }
    wanted = [_nearest(config, one, _least_step(one, rungs)) for one in wanted]
    found = []
    for most_gone in dict.fromkeys((_most_gone(config, arch, curves), 0)):
        shape = searched_shape(rungs, curves, wanted, most_gone)
        found.append(Candidate("whole layers" if shape.layers else "each layer", shape, _loss(curves, shape)))
    ends = {key: (spaces[key].width_in(found[-1].shape.widths), spaces[key].width_in(plain)) for key in rungs}
    near = {key: [width for width in widths if _is_halfway(width, *ends[key])] for key, widths in rungs.items()}
    if all(near.values()):
        with suppress(StructPruneError):  # the widths in between may be too few to save enough
            shape = searched_shape(near, curves, wanted)
            found.append(Candidate("halfway", shape, _loss(curves, shape)))
    return found


def _is_halfway(width: int, searched: int, plain: int) -> bool:
    """Whether a width lies between one width for all layers and the middle of it and the searched one."""
    return min(2 * plain, searched + plain) <= 2 * width <= max(2 * plain, searched + plain)


def _least_step(wanted: Resource, rungs: Mapping[Key, Sequence[int]]) -> float:
    """How much goes with the cheapest step from one width to the next."""
    steps = [
        wanted.unit[key] * (high - low)
        for key, widths in rungs.items()
        for high, low in pairwise(widths)
        if key in wanted.unit
    ]
    return min(steps, default=0.0)


def _uniform(
    config: StructPruneConfig,
    arch: ArchSpec,
    model: PreTrainedModel,
    names: Sequence[str],
    curves: Curves,
    wanted: Resource,
) -> list[Candidate]:
    """The best few shapes of one width, the best of those that keep all layers among them."""
    legal = legal_widths(config, arch, model.config)
    may = {name: choices(config, arch, name, legal[name]) for name in names}
    finest = max(may, key=lambda name: len(may[name]))
    step = min((high - low for low, high in pairwise(may[finest])), default=0)
    wanted = _nearest(config, wanted, step * sum(wanted.unit[key] for key in curves.units if key[1] == finest))
    ranked = uniform_shapes(may, curves, wanted, _most_gone(config, arch, curves))
    whole = [pair for pair in ranked if pair[1].layers is None][:1]
    most = FINALISTS if config.allocation == "search_uniform" else 1
    return [Candidate("one shape", shape, loss) for loss, shape in [*ranked[:most], *whole]]


def _nearest(config: StructPruneConfig, wanted: Resource, step: float) -> Resource:
    """What is wanted, to within half of a step, where it is a share or a mean and not a budget that is to be kept."""
    return wanted if config.budget is not None else replace(wanted, need=wanted.need - step / 2)


def _most_gone(config: StructPruneConfig, arch: ArchSpec, curves: Curves) -> int:
    return int((1 - config.min_width) * arch.num_layers) if curves.layers else 0


def _loss(curves: Curves, shape: Shape) -> float:
    """The total of the measured losses of what a shape has removed."""
    gone = [loss for layer, loss in curves.layers.items() if shape.layers is not None and layer not in shape.layers]
    kept = [
        curve[len(curve) - 1 - width[layer]]
        for (layer, name), curve in curves.units.items()
        if not isinstance(width := shape.widths[name], int) and layer in width
    ]
    return sum(gone) + sum(kept)


def _trials(
    model: PreTrainedModel,
    arch: ArchSpec,
    config: StructPruneConfig,
    evidence: Evidence,
    found: list[Candidate],
    probe: Probe,
) -> list[tuple[float, Candidate]]:
    """The loss of the model in each shape, after a pruning on a part of the samples."""
    if len(found) == 1:
        return [(0.0, found[0])]
    shares = torch.tensor(evidence.shares)
    most = max(1, TRIAL_TOKENS // len(evidence.domains) // evidence.domains[0].samples.shape[1])
    if evidence.statistics is None:
        evidence = replace(evidence, domains=[domain.portion(most) for domain in evidence.domains])
    losses = [_loss_in_shape(model, arch, config, evidence, one.shape, probe) for one in found]
    worst = config.objective == "worst"
    totals = [float(loss.max() if worst else loss @ shares) for loss in losses]
    return [(inf if isnan(total) else total, one) for total, one in zip(totals, found, strict=True)]


def _loss_in_shape(
    model: PreTrainedModel, arch: ArchSpec, config: StructPruneConfig, evidence: Evidence, shape: Shape, probe: Probe
) -> torch.Tensor:
    """The losses by domain of the model in a shape; the model itself is only masked, and comes back as it was."""
    smaller = model
    if shape.layers is not None:
        smaller = deepcopy(model)
        drop_layers_(smaller, arch, shape.layers)
        arch = describe(smaller, config.arch_file)
    widths = {name: width for name, width in shape.after_removal().items() if name != LAYER}
    sweep = Sweep(smaller, arch, config)
    try:
        sweep.run_(evidence.passes(smaller, arch), evidence.mixture, widths, None, "trial")
        return probe.losses(smaller)
    finally:
        sweep.consumers.undo_()
