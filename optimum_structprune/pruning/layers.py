"""Steps that remove whole layers."""

from __future__ import annotations

from itertools import groupby

import torch

from ..arch.spec import LAYER, MODEL, ArchSpec
from ..criteria.layers import BLOCK_INFLUENCE, LAYER_CRITERIA
from ..surgery.cut import drop_layers_
from ..surgery.plan import Plan, best_units
from ..system.processes import as_first_has_
from .evidence import judges_layers
from .run import Run
from .steps import Step


def remove_layers_(run: Run, step: Step) -> Plan:
    """Take out the layers that measured losses have chosen, or else those that matter least to the model as it is now.

    The config's criterion counts where it scores whole layers; otherwise block influence does.
    """
    with run.report.timed("layers"):
        arch = run.arch
        keep = _chosen(run, arch, step) if run.layers is None else run.layers
        run.changed = True
        drop_layers_(run.model, arch, keep)
    return Plan(arch.model_type, {(MODEL, LAYER): keep})


def _chosen(run: Run, arch: ArchSpec, step: Step) -> tuple[int, ...]:
    criterion = LAYER_CRITERIA.get(run.config.scored_by if judges_layers(run.config) else BLOCK_INFLUENCE)()
    scores_by_domain = [
        criterion.score(run.model, arch, list(batches))
        for _, batches in groupby(run.evidence.own_batches, lambda batch: batch.domain)
    ]
    scores = as_first_has_(run.evidence.mixture.combined(torch.stack(scores_by_domain)))
    return best_units(scores, arch.of(LAYER)[0].width_in(step.widths))
