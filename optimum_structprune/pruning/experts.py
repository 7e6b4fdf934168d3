"""The step that removes whole experts."""

from __future__ import annotations

from transformers.utils.logging import tqdm

from ..arch.meta import skeleton
from ..arch.shrink import shrunk_config
from ..forward.placement import Placement
from ..surgery.cut import adopt_config_, shrink_layer_
from ..surgery.plan import Plan, best_units
from .run import Run
from .steps import Step


def remove_experts_(run: Run, step: Step) -> Plan:
    """Take whole experts out of every layer, those first that contribute least (REAP, Lasby et al. 2025, eq. 8).

    An expert cannot be masked: a router is a softmax over logits, and no weight makes one of them minus infinity. So
    this is one step before the rounds, and the layers shrink at once.
    """
    with run.report.timed("experts"):
        model, arch, evidence = run.model, run.arch, run.evidence
        new_config = shrunk_config(model.config, arch, step.widths)
        smaller = skeleton(model, new_config)
        passes = evidence.run_passes(model, arch, evidence.own_batches, evidence.clock)
        placement, keep = Placement(model, arch), dict[tuple[int, str], tuple[int, ...]]()
        for layer in tqdm(range(arch.num_layers), desc="experts", unit="layer"):
            with placement.at(layer, changes=True):
                for space in arch.at(layer):
                    if space.kind in step.widths:
                        scores = evidence.mixture.combined(passes.contributions(layer, space))
                        keep[layer, space.name] = best_units(scores, space.width_in(step.widths))
                run.changed = True
                shrink_layer_(model, arch, layer, Plan(arch.model_type, keep), smaller)
                passes.advance(layer)
        adopt_config_(model, new_config, smaller)
    return Plan(arch.model_type, keep)
