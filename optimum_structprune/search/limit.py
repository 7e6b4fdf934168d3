"""The step that removes as much as a limit on perplexity allows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import ceil
from typing import Any

from ..arch.spec import Widths
from ..errors import StructPruneError
from ..pruning.run import Run, Step
from ..record.plan import Plan
from ..record.text import worst_ratio
from ..widths.allocation import multiple_of
from ..widths.schedule import legal_round_widths, next_legal
from .rounds import Rounds


def prune_within_limit_(run: Run, step: Step) -> Plan:
    """Run rounds while the perplexity of every domain is at most `max_perplexity_ratio` times the dense one; then
    halve the distance between the last widths that hold this limit and the first that do not.
    """
    rounds = Rounds(run, step.widths)
    limit = run.config.max_perplexity_ratio or 0.0
    state = rounds.pruning.snapshot(), run.data

    def holds(widths: Widths) -> bool:
        nonlocal state
        rounds.pruning.restore_(state[0])
        run.data = state[1]
        rounds.run_(widths)
        ratios = rounds.ratios()
        held = all(ratio <= limit for ratio in ratios.values())
        rounds.record(widths, ratios, holds=held)
        if held:
            state = rounds.pruning.snapshot(), run.data
        return held

    course = legal_round_widths(run.config, run.arch, run.model.config, step.widths)
    dense = _dense_widths(run, step.widths)
    held, missed = dense, None
    with rounds.undone_by_errors():
        for widths in course:
            if not holds(widths):
                missed = widths
                break
            held = widths
        if missed is not None:
            held = _halved(run, held, missed, holds)
        rounds.pruning.restore_(state[0])
        if held == dense:
            last = run.report.rounds[-1]
            name, ratio = worst_ratio(last["perplexity_ratio"])
            raise StructPruneError(
                f"max_perplexity_ratio={limit} is not held by domain {name!r} even with widths {last['widths']}, the "
                f"nearest to the dense ones, which give {ratio:.4f}; allow that, or name a smaller round_to."
            )
        return rounds.remove_masked_(held)


def _halved(run: Run, held: Widths, missed: Widths, holds: Callable[[Widths], bool]) -> Widths:
    """The narrowest widths that hold, halving between some that do and some that do not."""
    wide, narrow, near, far = held, missed, 0.0, 1.0
    while far - near > 0.5 / max(space.size for space in run.arch.spaces):  # less than any one unit
        middle = (near + far) / 2
        widths = _between(run, wide, narrow, middle)
        if widths == held or (widths != missed and holds(widths)):
            held, near = widths, middle
        else:
            missed, far = widths, middle
    return held


def _dense_widths(run: Run, target: Widths) -> Widths:
    """The present widths of the spaces of a target, in its form: one number, or one per layer."""
    sizes = {name: run.arch.widths(name) for name in target}
    return {
        name: max(sizes[name].values()) if isinstance(width, int) else {layer: sizes[name][layer] for layer in width}
        for name, width in target.items()
    }


def _between(run: Run, wide: Mapping[str, Any], narrow: Mapping[str, Any], share: float) -> Widths:
    """The legal widths after a share of the way from wide ones to narrow ones of the same form."""
    widths: dict[str, Any] = {}
    for name, least in narrow.items():
        multiple, most = multiple_of(run.config, run.dense_arch, name), wide[name]

        def between(most: int, least: int, multiple: int = multiple) -> int:
            return min(most, ceil((most - share * (most - least)) / multiple) * multiple)

        by_layer = isinstance(least, Mapping)
        widths[name] = {i: between(most[i], least[i]) for i in least} if by_layer else between(most, least)
    return next_legal(run.model.config, run.arch, widths)
