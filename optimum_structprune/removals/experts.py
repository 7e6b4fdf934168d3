"""The step that takes out whole experts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..arch.shrink import shrunk_config
from ..config.pruning import EXPERT_CRITERIA, EXPERT_SCORES
from ..method.score import best_units
from ..method.shrink import shrink_layer_
from ..record.plan import Plan
from ..sources.experts import WithExperts
from ..system.stages import progress
from .cut import rebuilding_
from .expert_refit import ExpertRefit


if TYPE_CHECKING:
    from ..pruning.run import Run, Step


def remove_experts_(run: Run, step: Step) -> Plan:
    """Take whole experts out of every layer, those first that contribute least; those that stay are refitted.

    An expert cannot be masked: a router is a softmax over logits, and no weight makes one of them minus infinity. So
    this is one step before the rounds, and the layers shrink at once.
    """
    with run.report.timed("experts"):
        model, arch, keep = run.model, run.arch, dict[tuple[int, str], tuple[int, ...]]()
        criterion = EXPERT_CRITERIA.get(run.config.scored_by if run.config.judges_experts else EXPERT_SCORES[0])
        source = run.data.source(model, arch, run.config.feedback)
        assert isinstance(source, WithExperts)
        with rebuilding_(model, shrunk_config(model.config, arch, step.widths)) as smaller:
            for layer in progress(range(arch.num_layers), desc="experts", unit="layer"):
                with source.at(layer, changes=True):
                    source.advance_dense(layer, step.widths)
                    spaces = [space for space in arch.at(layer) if space.kind in step.widths]
                    refits = {space.key: ExpertRefit(source, space, run.data) for space in spaces if run.config.fits}
                    for space in spaces:
                        see = refits[space.key].see_dense if refits else None
                        scores = run.data.combined(source.contributions(layer, space, criterion, see))
                        keep[space.key] = best_units(scores, space.width_in(step.widths))
                    run.changed = True
                    shrink_layer_(model, arch, layer, keep, smaller)
                    for key, refit in refits.items():
                        refit.fit_(len(keep[key]))
                    source.advance(layer)
    return Plan(arch.model_type, keep)
