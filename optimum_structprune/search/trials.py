"""Measures what a model loses when one layer alone gives up a part of its units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..arch.spec import ArchSpec, Axis, Space
from ..forward.generation import last_logits_only
from ..forward.metrics import divergence, tokens_at_once
from ..method.calibrate import output_energy
from ..method.layers import Batch, InMemory, Source, run_model
from ..method.loop import Method, best_units, calibrate, consumer_scores, refit_consumers
from ..method.shrink import Masks, Values, write_consumer_
from ..pruning.measure import PROBE_TOKENS, STRIDE, skipping_layers
from ..sources.data import CalibrationData, batches_of, source_of
from ..system.placement import is_spread
from ..system.processes import all_reduce_, process_count, process_index
from ..system.resume import Resume
from ..system.stages import progress


# The shares of a space that are removed in the trials. The loss is measured with the last, and follows from the errors
# of the outputs with the other. A third trial, at a half, changes the predicted loss by 2 %.
SHARES = (0.25, 0.75)
# What is pruned on trial in more than one layer is so on so many calibration tokens at most.
TRIAL_TOKENS = 2048
# A trial runs so many held-out tokens. What is pruned on trial in all layers runs on `PROBE_TOKENS`.
LAYER_TOKENS = PROBE_TOKENS // 2
Key = tuple[int, str]  # a layer and a kind of space
# What a model loses in nats per token by the number of units removed, from 0 on, in one layer and kind of space.
Curves = Mapping[Key, Sequence[float]]
# The losses by domain, shape `(domains,)`, by the number of units removed, by layer and kind of space.
Losses = dict[Key, dict[int, Tensor]]
# The values of the consumers of one kind of space in one layer, and the energy of their outputs' error, by the number
# of units removed.
Candidates = Mapping[int, tuple[Mapping[Axis, Values], float]]


class Probe:
    """Text set aside that runs through the model from one layer on, and the dense model's predictions for it.

    Where layers hand on hidden states alone, the layers before the present one do not run again. In memory are the
    hidden states and the dense logits of one token in four. Each of several processes holds all of the text.
    """

    def __init__(self, model: PreTrainedModel, arch: ArchSpec, batches: Sequence[Batch]):
        self.model, self.batches, self.layer = model, batches, 0
        self.source = source_of(model, arch, batches)
        # accelerate moves the index to the first device, and the head may be on another.
        self.keeps_some = last_logits_only(model) and not is_spread(model)
        self.dense_logits = [self._logits(index) for index in range(len(batches))]

    @classmethod
    def of(cls, model: PreTrainedModel, arch: ArchSpec, data: CalibrationData, tokens: int = PROBE_TOKENS) -> Probe:
        """Gives a probe of so many tokens: the beginnings of samples, as many tokens of each domain."""
        per_domain = ceil(tokens / len(data.domains))
        # Each sample has 128 tokens: the first ones, with little in front of them, say less.
        counts = [min(max(per_domain // 128, 1), len(domain.probe_or_heldout)) for domain in data.domains]
        # Each length takes a record of its own of how the layers are called.
        length = ceil(per_domain / max(counts))
        pairs = zip(data.domains, counts, strict=True)
        samples = [replace(domain, samples=domain.probe_or_heldout[:count, :length]) for domain, count in pairs]
        return cls(model, arch, batches_of(samples, data.options.batch_size))

    def advance(self) -> None:
        """Go on to the next layer."""
        self.source.advance(self.layer)
        self.layer += 1

    def losses(self, model: PreTrainedModel | None = None) -> Tensor:
        """KL(dense‖model) in nats per token, by domain, in the mean over its tokens; shape `(domains,)`."""
        total, count = (torch.zeros(1 + max(batch.domain for batch in self.batches)) for _ in range(2))
        for index, batch in [*enumerate(self.batches)][process_index() :: process_count()]:
            all_logits, all_dense = self._logits(index, model), self.dense_logits[index]
            size = tokens_at_once(all_logits.device, all_logits.shape[1])
            for logits, dense in zip(all_logits.split(size), all_dense.split(size), strict=True):
                total[batch.domain] += float(divergence(logits, dense)) * len(dense)
                count[batch.domain] += len(dense)
        all_reduce_([total, count])
        return total / count

    @torch.no_grad()
    def _logits(self, index: int, model: PreTrainedModel | None = None) -> Tensor:
        """The logits of every fourth token of a batch, shape `(tokens, vocab)`."""
        skips, ids = model is None and isinstance(self.source, InMemory), self.batches[index].ids
        options = {"logits_to_keep": torch.arange(0, ids.shape[1], STRIDE)} if self.keeps_some else {}
        with skipping_layers(self.source, self.layer, index) if skips else nullcontext():  # type: ignore[arg-type]
            logits = run_model(model or self.model, ids, **options).logits
        return (logits if options else logits[:, ::STRIDE]).flatten(0, 1)


@dataclass(frozen=True)
class LayerTrials:
    """Measures the model's loss when one layer alone gives up a part of its units."""

    masks: Masks  # those that each trial puts on and takes off
    data: CalibrationData
    probe: Probe
    spaces: Mapping[Key, Sequence[Space]]  # by layer and kind, as experts of one layer share their width

    def losses(self) -> Losses:
        """The losses of all trials; those that an earlier run has saved are not measured again."""
        store = self._store()
        saved = None if store is None else store.load()
        losses: Losses = {}
        for layer, name, by_units in [] if saved is None else saved.values["losses"]:
            losses[layer, name] = {int(units): torch.tensor(by_domain) for units, by_domain in by_units.items()}
        if not losses.keys() >= self.spaces.keys():
            self._measure_(losses, store)
        return {key: losses[key] for key in self.spaces}

    def _store(self) -> Resume | None:
        """The file of losses, for other targets of the same model and text; None where no folder is named."""
        config, folder = self.data.config, self.data.options.checkpoint_dir
        if folder is None:
            return None
        refit = (config.refit, config.damping, config.error_feedback)
        settings = (config.scored_by, refit, config.seed, SHARES, LAYER_TOKENS, STRIDE, TRIAL_TOKENS)
        key = self.data.key(self.masks.model, settings, self.data.shares)
        return Resume(Path(folder), key, f"losses-{key[:12]}")

    def _measure_(self, losses: Losses, store: Resume | None) -> None:
        """Add the losses that are missing."""
        masks, model, arch = self.masks, self.masks.model, self.masks.arch
        method = self.data.method(model, arch)
        # A trial has no errors that error feedback could see.
        source = source_of(model, arch, self.data.own_batches, fixed=True)
        for layer in progress(range(arch.num_layers), desc="measuring losses"):
            with source.at(layer):
                for key in [key for key in self.spaces if key[0] == layer and key not in losses]:
                    losses[key] = trial_losses(masks, candidates(masks, self.spaces[key], source, method), self.probe)
                source.advance(layer)
                self.probe.advance()
            if store is not None:
                rows = [
                    (layer, name, {units: by_domain.tolist() for units, by_domain in by_units.items()})
                    for (layer, name), by_units in losses.items()
                ]
                store.save(layer + 1, {"losses": rows})

    def curves(self, losses: Losses) -> Curves:
        """The loss of the model by the number of units that a layer gives up, in the mean over the domains."""
        config, shares = self.data.config, torch.tensor(self.data.shares)
        # A trial prunes one layer alone, and does not see how error feedback in later layers makes up for it: more for
        # the first ones. No correction and twice the slope were both measured to be worse (benchmarks/LOG.md).
        feedback, last = config.feedback_share, max(self.masks.arch.num_layers - 1, 1)
        price = {key: sum(space.unit_params * space.scale for space in spaces) for key, spaces in self.spaces.items()}
        each: dict[Key, Tensor] = {}
        for key, by_units in losses.items():
            stays = 1 - feedback * (1 - key[0] / last)
            totals = {units: stays * float(by_domain @ shares) for units, by_domain in by_units.items()}
            each[key] = unit_losses(self.spaces[key][0].width, totals)
        highest = max((float((each[key] / price[key]).max()) for key in each), default=0.0)
        for key, unit_loss in each.items():  # units beyond the last trial go after all that a trial has measured
            unit_loss[max(losses[key], default=len(unit_loss)) :] += highest * price[key]
        return {key: [0.0, *unit_loss.double().cumsum(0).tolist()] for key, unit_loss in each.items()}


def candidates(masks: Masks, spaces: Sequence[Space], source: Source, method: Method) -> Candidates:
    """Removes units of one kind of space in one layer on trial; the experts of a layer share their width."""
    made: dict[int, tuple[Mapping[Axis, Values], float]] = {}
    for space in spaces:
        dense, moments = calibrate(masks, source, method, space)
        width, weights = space.width, [weight for weight, _ in dense]
        scores = torch.stack(consumer_scores(method, space, weights, moments)).sum(0)
        for units in sorted({min(max(round(share * width), 1), width - 1) for share in SHARES} - {0}):
            keep = best_units(scores, (width - units) * space.scale)
            values = values_on_trial(masks, space, refit_consumers(method, space, keep, dense, moments))
            others, error = made.get(units, ({}, 0.0))
            for axis, before, own_moments in zip(space.consumers, weights, moments, strict=True):
                change = before - values[axis][0].float()
                error += output_energy(change, replace(own_moments, energy=None)) * own_moments.count
            made[units] = {**others, **values}, error
    return made


def values_on_trial(
    masks: Masks, space: Space, refitted: Sequence[tuple[Tensor, Tensor, Tensor | None]]
) -> Mapping[Axis, Values]:
    """The values of the consumers of a space with these columns, in the model's dtype; the model is left as it is."""
    with masks.holding(masks.present(space.consumers)):
        for axis, columns in zip(space.consumers, refitted, strict=True):
            write_consumer_(masks.model, axis, *columns)
        return masks.present(space.consumers)


def trial_losses(masks: Masks, made: Candidates, probe: Probe) -> dict[int, Tensor]:
    """The losses by domain, shape `(domains,)`, by the number of units removed.

    They are measured where most go. With fewer gone they are in proportion to the energy of the outputs' error, since
    for small changes the divergence is a square of them.
    """
    most = max(made, default=0)
    if not most:
        return {}
    values, largest = made[most]
    with masks.holding(values):
        measured = probe.losses()
    return {units: measured * (error / largest if largest else 1.0) for units, (_, error) in made.items()}


def unit_losses(width: int, losses: Mapping[int, float]) -> Tensor:
    """The loss that each unit of a space adds, shape `(width,)`: the cheapest first up to the last trial, and beyond.

    The loss as a function of the units removed is a power law between two trials, and goes on with the last one's
    exponent beyond them. Up to the first trial the exponent is at least 1, or else the first units would cost most.
    """
    if not losses:
        return torch.zeros(width)
    x = torch.tensor([float(units) for units in losses]).log()
    y = torch.tensor(list(losses.values())).clamp(min=1e-9).cummax(0).values.log()  # less is noise
    slopes = y.diff() / x.diff() if len(x) > 1 else torch.ones(1)
    slopes = torch.cat([slopes[:1].clamp(min=1.0), slopes])
    units = torch.arange(1, width + 1).log()
    segment = torch.bucketize(units, x)  # the first trial with as many units or more
    left = (segment - 1).clamp(min=0)
    total = (y[left] + slopes[segment.clamp(max=len(slopes) - 1)] * (units - x[left])).exp()
    each, measured = total.diff(prepend=torch.zeros(1)), max(losses)
    return torch.cat([each[:measured].sort().values, each[measured:].sort().values])
