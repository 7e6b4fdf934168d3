"""The step that prunes as far as a limit on perplexity allows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from transformers import PretrainedConfig

from ..arch.spec import ArchSpec, Width, Widths
from ..config.pruning import StructPruneConfig
from ..errors import StructPruneError
from ..record.text import worst_ratio
from ..surgery.plan import Plan
from ..widths.schedule import legal_round_widths, next_legal
from .rounds import Rounds
from .run import Run
from .steps import Step


T = TypeVar("T")


def prune_within_floor_(run: Run, step: Step) -> Plan:
    """Rounds as long as the perplexity of every domain stays below `max_perplexity_ratio` times the dense one; then
    halvings between the last widths that hold it and the first that do not.
    """
    model_config, config = run.model.config, run.config
    run.rounds = rounds = Rounds(run, step)
    arch = rounds.arch
    course = legal_round_widths(config, arch, model_config, step.target)
    full = full_widths(arch, step.target)
    state = rounds.snapshot(), rounds.evidence.shares

    def holds(widths: Widths) -> bool:
        nonlocal state
        rounds.restore_(*state)
        rounds.mask_(widths)
        ratios = rounds.ratios()
        held = all(ratio <= (config.max_perplexity_ratio or 0) for ratio in ratios.values())
        rounds.record(widths, ratios, holds=held)
        if held:
            state = rounds.snapshot(), rounds.evidence.shares
            # The halvings begin again after a kill; only the rounds before them are remembered.
            rounds.leave(widths, resumable=widths in course)
        return held

    finished = course[rounds.done - 1] if rounds.done else None
    widths = search(
        course[rounds.done :],
        finished,
        lambda high, low: halfway(config, model_config, arch, high or full, low),
        holds,
    )
    rounds.restore_(*state)
    if widths is None:
        raise StructPruneError(_out_of_reach(config, run.report.rounds[-1]))
    plan = rounds.remove_masked_(widths)
    run.rounds = None
    return plan


def search(
    course: Sequence[T], start: T | None, halfway: Callable[[T | None, T], T | None], holds: Callable[[T], bool]
) -> T | None:
    """The last of a course that holds, refined by halving toward the first that does not.

    Returns:
        The furthest that holds; None where nothing does.
    """
    good, bad = start, None
    for goal in course:
        if not holds(goal):
            bad = goal
            break
        good = goal
    while bad is not None and (middle := halfway(good, bad)) is not None:
        if holds(middle):
            good = middle
        else:
            bad = middle
    return good


def full_widths(arch: ArchSpec, like: Widths) -> Widths:
    """The present widths of the spaces in `like`, in its form: one number, or one per layer."""
    sizes = {name: arch.widths(name) for name in like}
    return {
        name: max(sizes[name].values()) if isinstance(width, int) else {layer: sizes[name][layer] for layer in width}
        for name, width in like.items()
    }


def halfway(
    config: StructPruneConfig, model_config: PretrainedConfig, arch: ArchSpec, high: Widths, low: Widths
) -> Widths | None:
    """The legal widths halfway between two; None where there are none in between."""
    middle: dict[str, Width] = {}
    for name, least in low.items():
        multiple = config.round_to if arch.of(name)[0].rounds else 1
        most = high[name]
        if isinstance(least, int) and isinstance(most, int):
            middle[name] = between(most, least, multiple)
        elif isinstance(least, Mapping) and isinstance(most, Mapping):
            middle[name] = {layer: between(most[layer], width, multiple) for layer, width in least.items()}
    legal = next_legal(model_config, arch, middle)
    return None if legal in (high, low) else legal


def between(high: int, low: int, multiple: int) -> int:
    """The multiple halfway between two widths; `high` where there is none in between."""
    middle = -(-(high + low) // (2 * multiple)) * multiple
    middle -= multiple if middle >= high else 0
    return middle if low < middle else high


def _out_of_reach(config: StructPruneConfig, last: Mapping[str, Any]) -> str:
    name, ratio = worst_ratio(last["perplexity_ratio"])
    return (
        f"max_perplexity_ratio={config.max_perplexity_ratio} is not held by domain {name!r} even with widths "
        f"{last['widths']}, the nearest to the dense ones, which give {ratio:.4f}; allow that, or name a smaller "
        "round_to."
    )
