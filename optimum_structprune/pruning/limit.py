"""The step that removes as much as a limit on perplexity allows."""

from __future__ import annotations

from ..arch.spec import Width, Widths
from ..errors import StructPruneError
from ..record.text import worst_ratio
from ..surgery.plan import Plan
from ..widths.schedule import next_legal
from .rounds import Rounds
from .run import Run, Step


def prune_within_limit_(run: Run, step: Step) -> Plan:
    """Rounds as long as the perplexity of every domain stays below `max_perplexity_ratio` times the dense one; then
    halvings between the last widths that hold it and the first that do not.
    """
    rounds = run.rounds = Rounds(run, step)
    limit = run.config.max_perplexity_ratio or 0.0
    state = rounds.sweep.snapshot(), run.evidence

    def holds(widths: Widths) -> bool:
        nonlocal state
        rounds.sweep.restore_(state[0])
        run.evidence = state[1]
        rounds.mask_(widths)
        ratios = rounds.ratios()
        held = all(ratio <= limit for ratio in ratios.values())
        rounds.record(widths, ratios, holds=held)
        if held:
            state = rounds.sweep.snapshot(), run.evidence
        return held

    # Shares of the way from the dense widths to the target: the largest that holds, the smallest that does not.
    enough, too_much = rounds.done / rounds.total, None
    while too_much is None and rounds.done < rounds.total:
        share = (rounds.done + 1) / rounds.total
        if holds(_widths_at(share, run, step.target)):
            enough = share
            rounds.finish()
        else:
            too_much = share
    # The halvings begin again after a kill; only the rounds before them are remembered.
    while too_much is not None and too_much - enough > _finest(run, step.target):
        middle = (enough + too_much) / 2
        widths, best, beyond = (_widths_at(share, run, step.target) for share in (middle, enough, too_much))
        if widths == best or (widths != beyond and holds(widths)):
            enough = middle
        else:
            too_much = middle
    rounds.sweep.restore_(state[0])
    widths = _widths_at(enough, run, step.target)
    if widths == _widths_at(0, run, step.target):
        raise StructPruneError(_out_of_reach(run))
    plan = rounds.remove_masked_(widths)
    run.rounds = None
    return plan


def _widths_at(share: float, run: Run, target: Widths) -> Widths:
    """The legal widths after a share of the way from the dense ones to the target, in the form of the target."""
    widths: dict[str, Width] = {}
    for name, width in target.items():
        multiple, sizes = run.config.round_to if run.arch.of(name)[0].rounds else 1, run.arch.widths(name)

        def narrowed(size: int, least: int, multiple: int = multiple) -> int:
            between = size - share * (size - least)
            return least if share == 1 else min(size, -int(-between // multiple) * multiple)

        if isinstance(width, int):
            widths[name] = narrowed(max(sizes.values()), width)
        else:
            widths[name] = {layer: narrowed(sizes[layer], least) for layer, least in width.items()}
    return next_legal(run.model.config, run.arch, widths)


def _finest(run: Run, target: Widths) -> float:
    """Half of the share of the way that one unit of the widest space makes."""
    gaps = [space.width - space.width_in(target) for name in target for space in run.arch.of(name)]
    return 0.5 / max(1, *gaps)


def _out_of_reach(run: Run) -> str:
    last = run.report.rounds[-1]
    name, ratio = worst_ratio(last["perplexity_ratio"])
    return (
        f"max_perplexity_ratio={run.config.max_perplexity_ratio} is not held by domain {name!r} even with widths "
        f"{last['widths']}, the nearest to the dense ones, which give {ratio:.4f}; allow that, or name a smaller "
        "round_to."
    )
