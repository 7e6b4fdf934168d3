"""Divide a removal into several steps, and choose the training steps after which they are taken."""

from __future__ import annotations

from bisect import bisect_left

from transformers import PretrainedConfig

from ..arch.shrink import legal_sizes
from ..arch.spec import ArchSpec, Width, Widths
from ..config.pruning import StructPruneConfig
from ..errors import StructPruneError


def round_widths(config: StructPruneConfig, arch: ArchSpec, widths: Widths) -> list[Widths]:
    """Return the widths after each round. Every round keeps the same share of units; the last widths are `widths`."""
    rounds: list[Widths] = []
    for number in range(1, config.rounds):
        progress = number / config.rounds
        widths_of_round: dict[str, Width] = {}
        for name, width in widths.items():
            widths_of_round[name] = _width_between(progress, arch.widths(name), width)
        rounds.append(widths_of_round)
    rounds.append(widths)
    return rounds


def _width_between(progress: float, sizes: dict[int, int], width: Width) -> Width:
    """Return size · (width / size)^progress for the size of a space, or for its `sizes` by layer."""
    if isinstance(width, int):
        size = max(sizes.values())
        return round(size * (width / size) ** progress)
    between = {}
    for layer, final in width.items():
        between[layer] = round(sizes[layer] * (final / sizes[layer]) ** progress)
    return between


def legal_round_widths(
    config: StructPruneConfig, arch: ArchSpec, model_config: PretrainedConfig, widths: Widths
) -> list[Widths]:
    """Return `round_widths` for rounds that each leave a model: the next larger legal widths."""
    legal = {name: legal_sizes(model_config, arch, name) for name in widths}

    def next_legal(name: str, width: int) -> int:
        return legal[name][bisect_left(legal[name], width)]

    rounds: list[Widths] = []
    for goals in round_widths(config, arch, widths):
        widths_of_round: dict[str, Width] = {}
        for name, goal in goals.items():
            if isinstance(goal, int):
                widths_of_round[name] = next_legal(name, goal)
            else:
                widths_of_round[name] = {layer: next_legal(name, width) for layer, width in goal.items()}
        rounds.append(widths_of_round)
    return rounds


def removal_steps(
    config: StructPruneConfig, start: int | float, end: int | float | None, every: int | None, max_steps: int
) -> list[int]:
    """Return the training steps after which units are removed.

    Args:
        config: The config, whose `rounds` is the number of removals unless `every` is given.
        start: The first step, or a share of all steps.
        end: The last step, or a share of all steps. None stands for a single removal.
        every: The number of steps between two removals.
        max_steps: The number of steps of the training.

    Raises:
        StructPruneError: If these contradict each other or the length of the training.
    """
    first = max(_step_number("start", start, max_steps), 1)
    last = first if end is None else _step_number("end", end, max_steps)
    if every is not None and (not isinstance(every, int) or every < 1):
        raise StructPruneError(f"every is a number of steps, 1 or more, got {every!r}.")
    if end is None and (every is not None or config.rounds > 1):
        name, number = ("rounds", config.rounds) if every is None else ("every", every)
        raise StructPruneError(f"{name}={number} divides the removal up to end; name end, or leave {name} out.")
    if last < first:
        raise StructPruneError(f"end={end!r} is step {last}, before start={start!r}, step {first}; name a later step.")
    if last > max_steps:
        raise StructPruneError(f"The last units go after step {last}, but training has {max_steps} steps.")

    if every is not None:
        return list(range(first, last + 1, every))
    if last > first and config.rounds == 1:
        raise StructPruneError(
            f"end={end!r} divides the removal over the steps {first} to {last}, and rounds=1 removes everything at "
            "once; set rounds=4 or more, or every, or leave end out."
        )
    count = min(config.rounds, last - first + 1)
    return [first + round((last - first) * index / max(count - 1, 1)) for index in range(count)]


def _step_number(name: str, step: int | float, max_steps: int) -> int:
    """Return a step from its number, or from a share of all steps."""
    is_number = isinstance(step, (int, float)) and not isinstance(step, bool)
    is_whole = is_number and (isinstance(step, int) or step <= 1 or step.is_integer())
    if not is_whole or not step >= 0:
        raise StructPruneError(f"{name} is a step, or a share of all steps from 0.0 to 1.0, got {step!r}.")
    if isinstance(step, float) and step <= 1:
        return round(max_steps * step)
    return int(step)
