"""The steps of a run in order, and the function that takes each kind of step."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ..arch.spec import EXPERT, HIDDEN, LAYER, VOCAB, ArchSpec, Widths
from ..config.pruning import StructPruneConfig
from ..surgery.plan import Plan
from ..widths.schedule import round_widths
from .limit import prune_within_limit_
from .rounds import prune_units_
from .run import Run, Step
from .whole import remove_channels_, remove_experts_, remove_layers_


# Whole layers, experts and channels of the residual stream go first; `UNITS` and `LIMIT` prune inside the layers.
UNITS, LIMIT = "units", "limit"
REMOVERS: dict[str, Callable[[Run, Step], Plan]] = {
    LAYER: remove_layers_,
    EXPERT: remove_experts_,
    HIDDEN: remove_channels_,
    UNITS: prune_units_,
    LIMIT: prune_within_limit_,
}
WHOLE_MODEL = (VOCAB, LAYER, EXPERT, HIDDEN)  # tokens go before any step, see `pruning.vocabulary`


def steps(config: StructPruneConfig, arch: ArchSpec, widths: Widths) -> Iterator[Step]:
    """The steps that bring a model to its final widths.

    Layers go first, then experts, then channels of the residual stream, then units inside the layers, in
    `config.rounds` rounds.
    """
    for kind in WHOLE_MODEL:
        if kind in widths:
            target = {kind: widths[kind]}
            yield from _numbered(kind, round_widths(config, arch, target) if kind == LAYER else [target])
    inside = {name: width for name, width in widths.items() if name not in WHOLE_MODEL}
    if inside and config.max_perplexity_ratio is not None:
        yield Step(LIMIT, inside, inside)
    elif inside:
        yield from _numbered(UNITS, round_widths(config, arch, inside))


def _numbered(kind: str, course: list[Widths]) -> Iterator[Step]:
    for number, widths in enumerate(course, start=1):
        yield Step(kind, widths, course[-1], number, len(course))
