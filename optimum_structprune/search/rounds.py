"""Rounds inside the layers: all but the last only mask units, so that every round fits the dense weights anew."""

from __future__ import annotations

from collections.abc import Mapping

from transformers import PreTrainedModel

from ..arch.meta import shrunk_skeleton
from ..arch.modules import adopt_config_
from ..arch.spec import Widths
from ..pruning.run import Run, Step
from ..record.plan import Plan
from ..system.stages import progress
from ..widths.budget import biased_spaces
from ..widths.schedule import round_widths
from .masked import MaskedPruning


def prune_in_rounds_(run: Run, step: Step) -> Plan:
    """Bring all layers to the widths of a step in several rounds: the last removes all that is masked, each layer as
    soon as it is finished.
    """
    *masking, last = round_widths(run.config, run.arch, step.widths)
    smaller = shrunk_skeleton(run.model, run.arch, last, biased_spaces(run.config, run.arch, last))
    pruning = MaskedPruning(run.model, run.arch, run.config)
    try:
        for number, widths in enumerate(masking, 1):
            run_round_(run, pruning, number, widths)
            record(run, widths, ratios(run))
        run_round_(run, pruning, run.config.rounds, last, smaller)
        record(run, last, {})
    except BaseException:  # Ctrl-C too
        pruning.undo_()
        raise
    adopt_config_(run.model, smaller)
    return pruning.plan


def run_round_(
    run: Run, pruning: MaskedPruning, number: int, widths: Widths, smaller: PreTrainedModel | None = None
) -> None:
    """Run a round: it only masks units, or with the `smaller` model without weights lets each layer lose them as soon
    as it is finished.
    """
    count, total = run.arch.num_layers, run.config.rounds
    try:
        with run.report.timed(f"round {number}"):
            method, source = pruning.method(run.data), run.data.source(run.model, run.arch, run.config.feedback)
            # The bar counts the layers of all rounds, for the time that is left.
            bar = {"initial": (number - 1) * count, "total": total * count, "unit": "layer"}
            for layer in progress(range(count), desc=f"round {number}/{total}", **bar):
                with source.at(layer, changes=True):
                    pruning.prune_layer_(layer, source, method, widths, smaller)
    finally:
        run.changed = run.changed or pruning.shrunk


def ratios(run: Run) -> dict[str, float]:
    """Perplexity over the dense model's, by domain; nothing where no setting asks for it."""
    if run.measure is None or not (run.config.reweights and run.arch.causal):
        return {}
    with run.report.timed("perplexity"):
        return run.measure.ratios(run.model, run.arch)


def record(run: Run, widths: Widths, by_domain: Mapping[str, float]) -> None:
    """Enter a round into the report, and weigh the domains anew for the next."""
    if not run.config.reweights:
        return
    shares = dict(zip(run.data.names, run.data.shares, strict=True))
    run.report.rounds.append({"widths": dict(widths), "shares": shares, "perplexity_ratio": dict(by_domain)})
    if by_domain:
        run.data = run.data.reweighted(by_domain)
