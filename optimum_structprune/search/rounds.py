"""Rounds inside the layers: all but the last only mask units, so that every round fits the dense weights anew."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from transformers import PreTrainedModel

from ..arch.meta import shrunk_skeleton
from ..arch.modules import adopt_config_
from ..arch.spec import Widths
from ..forward.metrics import same_outputs
from ..pruning.run import Run, Step
from ..record.plan import Plan
from ..removals.cut import shrink_
from ..system.stages import progress
from ..widths.budget import biased_spaces
from ..widths.schedule import round_widths
from .masked import MaskedPruning


def prune_in_rounds_(run: Run, step: Step) -> Plan:
    """Bring all layers to the widths of a step in several rounds: the last removes all that is masked, each layer as
    soon as it is finished.
    """
    rounds = Rounds(run, step.widths)
    *masking, last = round_widths(run.config, run.arch, step.widths)
    smaller = shrunk_skeleton(run.model, run.arch, last, rounds.biased)
    with rounds.undone_by_errors():
        for widths in masking:
            rounds.run_(widths)
            rounds.record(widths, rounds.ratios())
        rounds.run_(last, smaller)
        rounds.record(last, {})
    adopt_config_(run.model, smaller)
    return rounds.pruning.plan


class Rounds:
    """The rounds of one pruning inside the layers; `begun` counts them."""

    def __init__(self, run: Run, widths: Widths):
        self.run, self.arch = run, run.arch
        self.biased = biased_spaces(run.config, run.arch, widths)
        self.pruning = MaskedPruning(run.model, run.arch, run.config)
        self.begun = 0

    @contextmanager
    def undone_by_errors(self) -> Iterator[None]:
        """Have an error inside `with` make the model dense again, unless it has lost units for good."""
        try:
            yield
        except BaseException:  # Ctrl-C too
            self.pruning.undo_()
            raise

    def run_(self, widths: Widths, smaller: PreTrainedModel | None = None) -> None:
        """Run a round: it only masks units, or with the `smaller` model without weights lets each layer lose them as
        soon as it is finished.
        """
        run, pruning, count = self.run, self.pruning, self.arch.num_layers
        self.begun += 1
        number, total = self.begun, max(self.begun, run.config.rounds)
        try:
            with run.report.timed(f"round {number}"):
                method, source = pruning.method(run.data), run.data.source(run.model, self.arch, run.data.feedback)
                # The bar counts the layers of all rounds, for the time that is left.
                bar = {"initial": (number - 1) * count, "total": total * count, "unit": "layer"}
                for layer in progress(range(count), desc=f"round {number}/{total}", **bar):
                    with source.at(layer, changes=True):
                        pruning.prune_layer_(layer, source, method, widths, smaller)
        finally:
            run.changed = run.changed or pruning.shrunk

    def remove_masked_(self, widths: Widths) -> Plan:
        """Take what is masked out of the model, without another round."""
        self.run.changed = self.pruning.shrunk = True
        with same_outputs("The model", self.run.model):
            shrink_(self.run.model, self.arch, self.pruning.plan, widths, self.biased)
        return self.pruning.plan

    def ratios(self) -> dict[str, float]:
        """Perplexity over the dense model's, by domain; nothing where no setting asks for it."""
        measure = self.run.measure
        if measure is None or not (self.run.config.measures_rounds and self.arch.causal):
            return {}
        with self.run.report.timed("perplexity"):
            return measure.ratios(self.run.model, self.arch)

    def record(self, widths: Widths, ratios: Mapping[str, float], **more: bool) -> None:
        """Enter a round into the report, and weigh the domains anew for the next."""
        config, data = self.run.config, self.run.data
        if config.measures_rounds:
            shares = dict(zip(data.names, data.shares, strict=True))
            entry = {"widths": dict(widths), "shares": shares, "perplexity_ratio": dict(ratios), **more}
            self.run.report.rounds.append(entry)
        if config.reweights and ratios:
            self.run.data = data.reweighted(ratios)
