"""Measure the loss of a model in trials that remove units of one layer alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..arch.spec import Axis, Space
from ..method.calibrate import output_energy
from ..method.layers import Source
from ..method.loop import Method, best_units, calibrate, consumer_scores, refit_consumers
from ..method.shrink import Masks, Values, write_consumer_
from ..steps.data import CalibrationData, source_of
from ..system.resume import Resume
from ..system.stages import progress
from .probe import PROBE_TOKENS, STRIDE, Probe


# The shares of a space that are removed in the trials. The loss is measured at the larger share, and estimated from
# the error of the outputs at the smaller share. A third trial, at a half, changes the predicted loss by 2 %.
REMOVED_SHARES = (0.25, 0.75)
# The maximum number of calibration tokens of a trial that prunes several layers.
SHAPE_TOKENS = 2048
# The held-out tokens of a trial of one layer. A trial that prunes all layers runs on `PROBE_TOKENS`.
LAYER_TOKENS = PROBE_TOKENS // 2
Key = tuple[int, str]  # a layer and a kind of space
# The loss of the model in nats per token by the number of units removed, from 0 on, in one layer and kind of space.
Curves = Mapping[Key, Sequence[float]]
# The losses by domain, shape `(domains,)`, by the number of units removed, by layer and kind of space.
LayerLosses = dict[Key, dict[int, Tensor]]
# The values of the consumers of one kind of space in one layer, and the energy of their outputs' error, by the number
# of units removed.
LayerCuts = Mapping[int, tuple[Mapping[Axis, Values], float]]


@dataclass(frozen=True)
class LayerTrials:
    """Trials that measure the loss of the model when units of one layer alone are removed."""

    masks: Masks  # each trial sets them and restores them
    data: CalibrationData
    probe: Probe
    spaces: Mapping[Key, Sequence[Space]]  # by layer and kind, because experts of one layer share their width

    def losses(self) -> LayerLosses:
        """Return the losses of all trials. LayerLosses that an earlier run has saved are not measured again."""
        store = self._store()
        losses: LayerLosses = {}
        if store is not None:
            losses = _saved_losses(store)

        if not losses.keys() >= self.spaces.keys():
            self._measure_(losses, store)

        return {key: losses[key] for key in self.spaces}

    def _store(self) -> Resume | None:
        """Return the file of losses of this model and text, or None without a `checkpoint_dir`."""
        config = self.data.config
        folder = self.data.options.checkpoint_dir
        if folder is None:
            return None

        refit = (config.refit, config.damping, config.error_feedback)
        settings = (config.scored_by, refit, config.seed, REMOVED_SHARES, LAYER_TOKENS, STRIDE, SHAPE_TOKENS)
        key = self.data.key(self.masks.model, settings, self.data.shares)
        return Resume(Path(folder), key, f"losses-{key[:12]}")

    def _measure_(self, losses: LayerLosses, store: Resume | None) -> None:
        """Add the missing losses, and save all losses after each layer."""
        masks = self.masks
        arch = masks.arch
        method = self.data.method(masks.model, arch)
        # A trial changes one layer, so no earlier layer has an error for error feedback to correct.
        source = source_of(masks.model, arch, self.data.own_batches, fixed=True)

        for layer in progress(range(arch.num_layers), desc="Measuring losses of single layers", unit="layer"):
            with source.at(layer):
                for key, spaces in self.spaces.items():
                    if key[0] == layer and key not in losses:
                        losses[key] = trial_losses(masks, layer_cuts(masks, spaces, source, method), self.probe)
                source.advance(layer)
                self.probe.advance()
            if store is not None:
                store.save(layer + 1, {"losses": _rows(losses)})

    def curves(self, losses: LayerLosses) -> Curves:
        """Return the mean loss of the model over the domains, by the number of units removed from a layer."""
        shares = torch.tensor(self.data.shares)
        last_layer = max(self.masks.arch.num_layers - 1, 1)

        loss_by_unit: dict[Key, Tensor] = {}
        for key, by_units in losses.items():
            layer, _ = key
            # Error feedback in later layers corrects part of an error, and a larger part of an error in an early
            # layer. A trial does not show this, because it prunes one layer alone. No correction and twice the slope
            # both measured worse (benchmarks/LOG.md).
            remaining = 1 - self.data.config.feedback_share * (1 - layer / last_layer)
            totals = {units: remaining * float(by_domain @ shares) for units, by_domain in by_units.items()}
            loss_by_unit[key] = unit_losses(self.spaces[key][0].width, totals)

        # Units beyond the last trial cost more than all measured units, so that they are removed last.
        highest = 0.0
        for key, values in loss_by_unit.items():
            highest = max(highest, float((values / self._unit_params(key)).max()))
        for key, values in loss_by_unit.items():
            num_measured = max(losses[key], default=len(values))
            values[num_measured:] += highest * self._unit_params(key)

        curves = {}
        for key, values in loss_by_unit.items():
            curves[key] = [0.0] + values.double().cumsum(0).tolist()
        return curves

    def _unit_params(self, key: Key) -> int:
        """Return the number of parameters of a unit of a kind of space in one layer."""
        return sum(space.unit_params * space.scale for space in self.spaces[key])


def _saved_losses(store: Resume) -> LayerLosses:
    """Return the losses that an earlier run has saved."""
    losses: LayerLosses = {}
    saved = store.load()
    if saved is None:
        return losses
    for layer, name, by_units in saved.values["losses"]:
        losses[layer, name] = {int(units): torch.tensor(by_domain) for units, by_domain in by_units.items()}
    return losses


def _rows(losses: LayerLosses) -> list[tuple[int, str, dict[int, list[float]]]]:
    """Return losses as values that JSON can store; see `_saved_losses`."""
    rows = []
    for (layer, name), by_units in losses.items():
        rows.append((layer, name, {units: by_domain.tolist() for units, by_domain in by_units.items()}))
    return rows


def layer_cuts(masks: Masks, spaces: Sequence[Space], source: Source, method: Method) -> LayerCuts:
    """Return consumers with units of one kind of space in one layer removed. Experts of a layer share their width."""
    by_units: dict[int, tuple[dict[Axis, Values], float]] = {}
    for space in spaces:
        original, moments = calibrate(masks, source, method, space)
        weights = [weight for weight, _ in original]
        scores = torch.stack(consumer_scores(method, space, weights, moments)).sum(0)

        for units in _trial_units(space.width):
            keep = best_units(scores, (space.width - units) * space.scale)
            values = values_on_trial(masks, space, refit_consumers(method, space, keep, original, moments))

            all_values, error = by_units.get(units, ({}, 0.0))
            all_values.update(values)
            for axis, weight, own_moments in zip(space.consumers, weights, moments, strict=True):
                change = weight - values[axis][0].float()
                error += output_energy(change, replace(own_moments, energy=None)) * own_moments.count
            by_units[units] = (all_values, error)
    return by_units


def _trial_units(width: int) -> list[int]:
    """Return the numbers of units that the trials of a space remove, in rising order."""
    numbers = {min(max(round(share * width), 1), width - 1) for share in REMOVED_SHARES}
    return sorted(numbers - {0})


def values_on_trial(
    masks: Masks, space: Space, refitted: Sequence[tuple[Tensor, Tensor, Tensor | None]]
) -> Mapping[Axis, Values]:
    """Return the values of consumers with refitted columns, in the model's dtype. The model does not change."""
    with masks.holding(masks.current(space.consumers)):
        for axis, (columns, weight, bias) in zip(space.consumers, refitted, strict=True):
            write_consumer_(masks.model, axis, columns, weight, bias)
        return masks.current(space.consumers)


def trial_losses(masks: Masks, by_units: LayerCuts, probe: Probe) -> dict[int, Tensor]:
    """Return the losses by domain, shape `(domains,)`, by the number of units removed.

    The loss is measured with the largest number of units removed. With a smaller number, it is proportional to the
    energy of the outputs' error, because the divergence is quadratic in small changes.
    """
    largest = max(by_units, default=0)
    if not largest:
        return {}

    values, largest_error = by_units[largest]
    with masks.holding(values):
        largest_loss = probe.losses()

    losses = {}
    for units, (_, error) in by_units.items():
        share = 1.0
        if largest_error:
            share = error / largest_error
        losses[units] = largest_loss * share
    return losses


def unit_losses(width: int, losses: Mapping[int, float]) -> Tensor:
    """Return the loss that each unit of a space adds, shape `(width,)`, the cheapest units first.

    The loss as a function of the units removed is a power law between two trials. The last exponent also applies
    beyond the last trial. Up to the first trial the exponent is at least 1, or the first units would cost most. Units
    are sorted up to the last trial, and again beyond it.

    Args:
        width: The number of units.
        losses: The loss of each trial, by the number of units removed, in rising order.
    """
    if not losses:
        return torch.zeros(width)

    x = torch.tensor([float(units) for units in losses]).log()
    # A loss that falls with a growing number of removed units is noise.
    y = torch.tensor(list(losses.values())).clamp(min=1e-9).cummax(0).values.log()
    slopes = torch.ones(1)
    if len(x) > 1:
        slopes = y.diff() / x.diff()
    slopes = torch.cat([slopes[:1].clamp(min=1.0), slopes])

    units = torch.arange(1, width + 1).log()
    segment = torch.bucketize(units, x)  # the first trial with at least this number of units
    start = (segment - 1).clamp(min=0)
    exponent = slopes[segment.clamp(max=len(slopes) - 1)]
    total = (y[start] + exponent * (units - x[start])).exp()

    increments = total.diff(prepend=torch.zeros(1))
    num_measured = max(losses)
    return torch.cat([increments[:num_measured].sort().values, increments[num_measured:].sort().values])
