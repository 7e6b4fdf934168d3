"""What it costs the model when one layer alone gives up a part of its units: measured, not estimated."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from inspect import signature
from math import ceil
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.utils.logging import tqdm

from ..arch.load import layer_list
from ..arch.spec import ArchSpec, Space
from ..calibration.passes import Passes, batches_of, passes_over
from ..calibration.sequential import LayerPasses
from ..forward.clock import Clock
from ..forward.divergence import divergence
from ..forward.hooks import intercept, replaying
from ..forward.metrics import TOKENS_AT_ONCE, evaluating, run_model
from ..widths.ranking import spaces_by_layer
from .evidence import mixture, passes_of
from .sweep import Consumers, Sweep


if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..calibration.tally import Batch
    from ..config.pruning import StructPruneConfig
    from ..domains.load import Domain
    from ..saving.report import Report


# How much of a space goes in the trials. A third one, at a half, would find little that these two do not.
SHARES = (0.25, 0.75)
# Held-out tokens, over all domains, that a trial runs, and every which of them is judged.
PROBE_TOKENS = 4096
STRIDE = 4
# Nats per token; less is noise.
LEAST_LOSS = 1e-9
# What no trial has measured goes last.
UNMEASURED = 1e6


class Probe:
    """Held-out text that runs through the model from one layer on, and what the dense model predicts there.

    Where layers hand on hidden states alone, those before the present one do not run again. In memory are the text's
    hidden states and the dense logits of one token in four.

    Args:
        model: The dense model.
        arch: Its description.
        batches: The text.
    """

    def __init__(self, model: PreTrainedModel, arch: ArchSpec, batches: Sequence[Batch]):
        self.model, self.batches, self.layer = model, batches, 0
        self.passes = passes_over(model, arch, batches)
        self.layers = list(layer_list(model, arch))
        self.more: dict[str, Any] = {}
        if "logits_to_keep" in signature(model.forward).parameters:
            self.more["logits_to_keep"] = torch.arange(0, batches[0].ids.shape[1], STRIDE)
        # What a layer returns beside hidden states; None where it returns them bare.
        self.rest: dict[int, tuple[Any, ...] | None] = {}
        with intercept(self.layers, lambda *_: None, self._see):
            self.dense = [self._logits(index) for index in range(len(batches))]

    def advance(self) -> None:
        """Go on to the next layer."""
        self.passes.advance(self.layer)
        self.layer += 1

    def losses(self) -> Tensor:
        """KL(dense‖model) in nats per token, by domain, in the mean over its tokens; shape `(domains,)`."""
        total, count = (torch.zeros(1 + max(batch.domain for batch in self.batches)) for _ in range(2))
        for index, batch in enumerate(self.batches):
            pairs = (values.split(TOKENS_AT_ONCE) for values in (self._logits(index), self.dense[index]))
            for logits, dense in zip(*pairs, strict=True):
                total[batch.domain] += float(divergence(logits, dense)) * len(dense)
                count[batch.domain] += len(dense)
        return total / count

    def _see(self, index: int, output: Any) -> None:
        self.rest[index] = output[1:] if isinstance(output, tuple) else None

    @torch.no_grad()
    def _logits(self, index: int) -> Tensor:
        """Of every fourth token of a batch, shape `(tokens, vocab)`."""
        skipped = self.layer if isinstance(self.passes, LayerPasses) else 0
        outputs = [self._output(at, index) for at in range(skipped)]
        with replaying(self.layers[:skipped], outputs):
            logits = run_model(self.model, self.batches[index].ids, **self.more).logits
        return (logits if self.more else logits[:, ::STRIDE]).flatten(0, 1)

    def _output(self, at: int, index: int) -> Any:
        """What layer `at` returns: what enters the present layer, which is all that matters of it."""
        assert isinstance(self.passes, LayerPasses)
        hidden, rest = self.passes.hidden[index], self.rest[at]
        return hidden if rest is None else (hidden, *rest)


def sensitivities(
    model: PreTrainedModel,
    arch: ArchSpec,
    config: StructPruneConfig,
    domains: list[Domain],
    names: Collection[str],
    report: Report,
) -> dict[tuple[int, str], Tensor]:
    """Scores of units that compare over layers and spaces: what the model loses with each, per parameter.

    Every layer in turn gives up a quarter and three quarters of a space, with the refit of the config, while all
    others are dense; the loss is KL(dense‖model) on held-out text. The objective `mean` takes the domains' losses
    together by weight, `worst` those of the domain that loses most in all trials.

    Args:
        model: A causal language model; it comes back as it was.
        arch: Its description.
        config: How to prune.
        domains: Calibration text, some of it held out.
        names: Kinds of space.
        report: Takes the time.
    """
    # Error feedback makes up for errors of the layers before, and here there are none. A bias would stay behind.
    refit = "none" if config.refit == "bias" else config.refit
    sweep = Sweep(model, arch, replace(config, error_feedback=0.0, refit=refit), mixture(config, domains))
    spaces = {
        (layer, name): found
        for name in names
        for layer, found in spaces_by_layer(arch, name).items()
        if layer not in config.skip_layers
    }
    clock = Clock(model.device)
    with evaluating(model), report.timed("sensitivity"):
        trials = all_trials(sweep, spaces, domains, clock)
    report.note_domains(clock.seconds, [domain.name for domain in domains])
    shares = torch.tensor(sweep.mixture.shares)
    if config.objective == "worst":
        totals = torch.stack([losses for found in trials.values() for losses in found.values()]).sum(0)
        shares = torch.zeros(len(shares)).scatter_(0, totals.argmax(), 1.0)
    remaining = remaining_error(arch.num_layers, float(config.error_feedback) if config.fits else 0.0)
    scores: dict[tuple[int, str], Tensor] = {}
    for (layer, name), found in trials.items():
        losses = {gone: remaining[layer] * float(by_domain @ shares) for gone, by_domain in found.items()}
        price = sum(space.unit_params * space.scale for space in spaces[layer, name])
        scores |= {(layer, space.name): unit_losses(space, losses) / price for space in spaces[layer, name]}
    return scores


def all_trials(
    sweep: Sweep, spaces: Mapping[tuple[int, str], Sequence[Space]], domains: list[Domain], clock: Clock
) -> dict[tuple[int, str], dict[int, Tensor]]:
    """What `trial_losses` gives for each of `spaces`, by layer and kind."""
    trials = {}
    passes = passes_of(sweep, domains, None, clock)
    probe = Probe(sweep.model, sweep.arch, probe_batches(domains, sweep.config.batch_size))
    for layer in tqdm(range(sweep.arch.num_layers), desc="sensitivity", unit="layer"):
        for key, found in spaces.items():
            if key[0] == layer:
                trials[key] = trial_losses(sweep, found, passes, probe)
        passes.advance(layer)
        probe.advance()
    return trials


def remaining_error(num_layers: int, error_feedback: float) -> list[float]:
    """How much of its error is left of every layer in the end: of the last one all, and of the first what no
    error_feedback behind it takes away.

    A trial prunes one layer alone, so it sees nothing of what later refits make up for. On a straight line from
    `1 - error_feedback` to 1: between no such weights and twice as steep ones, both measured to be worse.
    """
    return [1 - error_feedback * (1 - layer / max(num_layers - 1, 1)) for layer in range(num_layers)]


def probe_batches(domains: Sequence[Domain], batch_size: int) -> list[Batch]:
    """Held-out samples of every domain, as many of each, of about `PROBE_TOKENS` in all."""
    count = max(1, ceil(PROBE_TOKENS / domains[0].heldout.shape[1] / len(domains)))
    return batches_of([replace(domain, samples=domain.heldout[:count], mask=None) for domain in domains], batch_size)


def trial_losses(sweep: Sweep, spaces: Sequence[Space], passes: Passes, probe: Probe) -> dict[int, Tensor]:
    """What the model loses with so many units gone from one kind of space in one layer.

    Args:
        sweep: Prunes on trial.
        spaces: One, or one per expert; they share their width.
        passes: The calibration data, at that layer.
        probe: The held-out text, at that layer.

    Returns:
        By units of width gone: losses by domain, shape `(domains,)`.
    """
    width = spaces[0].width
    gone = sorted({min(max(round(share * width), 1), width - 1) for share in SHARES} - {0})
    found: dict[int, dict] = {units: {} for units in gone}
    for space in spaces:
        evidence = passes.gather(space.layer, space, sweep.gram)
        for units, consumers in found.items():
            consumers.update(sweep.trial(space, evidence, (width - units) * space.scale))
    return {units: _judged(sweep, consumers, probe) for units, consumers in found.items()}


def _judged(sweep: Sweep, consumers: Consumers, probe: Probe) -> Tensor:
    with sweep.holding(consumers):
        return probe.losses()


def unit_losses(space: Space, losses: Mapping[int, float]) -> Tensor:
    """What every unit of a space costs, the cheapest first: the measured losses, as a power of the units gone between
    two of them. What goes beyond the last costs more than all that was measured, in the order of that power.

    Args:
        space: The space.
        losses: By units of width gone, ascending; what is less than with fewer units gone is noise.

    Returns:
        Ascending, shape `(space.size,)`.
    """
    if not losses:
        return torch.zeros(space.size)
    x = torch.tensor([float(units) for units in losses]).log()
    y = torch.tensor(list(losses.values())).clamp(min=LEAST_LOSS).cummax(0).values.log()
    slopes = y.diff() / x.diff() if len(x) > 1 else torch.ones(1)
    # Up to the first trial a loss grows in proportion or faster, or else its first units would be the dearest.
    slopes = torch.cat([slopes[:1].clamp(min=1.0), slopes])
    at = torch.arange(1, space.width + 1).log()
    segment = torch.bucketize(at, x)  # the trial above
    left = (segment - 1).clamp(min=0)
    total = (y[left] + slopes[segment.clamp(max=len(slopes) - 1)] * (at - x[left])).exp()
    each = total.diff(prepend=torch.zeros(1))
    each[max(losses) :] *= UNMEASURED
    return each.sort().values.repeat_interleave(space.scale)
