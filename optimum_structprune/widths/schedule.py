"""Divide a removal into several rounds, and choose the training step of each round."""

from __future__ import annotations

from bisect import bisect_left

from transformers import PretrainedConfig

from ..arch.shrink import legal_sizes
from ..arch.spec import ArchSpec, Width, Widths
from ..config.pruning import StructPruneConfig
from ..system.errors import StructPruneError


# The number of removals in a training whose config has one round.
REMOVALS = 4


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

    widths = {}
    for layer, final_width in width.items():
        size = sizes[layer]
        widths[layer] = round(size * (final_width / size) ** progress)
    return widths


def legal_round_widths(
    config: StructPruneConfig, arch: ArchSpec, model_config: PretrainedConfig, widths: Widths
) -> list[Widths]:
    """Return `round_widths`, with each width increased to the next legal width, so that each round makes a model."""
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
    config: StructPruneConfig, start: int | float, end: int | float | None, interval: int | None, max_steps: int
) -> list[int]:
    """Return the training steps after which units are removed.

    Args:
        config: The config. Its `rounds` is the number of removals unless `interval` is set. One round stands for
            `REMOVALS` removals if there is an `end`.
        start: The first step, or a share of all steps.
        end: The last step, or a share of all steps. None stands for a single removal.
        interval: The number of steps between two removals, the argument `every` of the callback.
        max_steps: The number of steps of the training.

    Raises:
        StructPruneError: If the arguments contradict each other or the length of the training.
    """
    start_step = max(_step_number("start", start, max_steps), 1)
    end_step = start_step
    if end is not None:
        end_step = _step_number("end", end, max_steps)

    if interval is not None and (not isinstance(interval, int) or interval < 1):
        raise StructPruneError(f"`every` must be a number of steps, at least 1, got {interval!r}.")
    if end is None and interval is not None:
        raise StructPruneError(f"`every={interval}` divides the removal up to `end`. Set `end`, or remove `every`.")
    if end is None and config.rounds > 1:
        raise StructPruneError(
            f"`rounds={config.rounds}` divides the removal up to `end`. Set `end`, or remove `rounds`."
        )

    if end_step < start_step:
        raise StructPruneError(
            f"`end={end!r}` is step {end_step}, before `start={start!r}`, step {start_step}. Set a later `end`."
        )
    if end_step > max_steps:
        raise StructPruneError(f"The last removal is after step {end_step}, but training has {max_steps} steps.")

    num_steps = end_step - start_step
    if interval is not None:
        return list(range(start_step, end_step + 1, interval))

    rounds = config.rounds
    if rounds == 1:
        rounds = REMOVALS
    count = min(rounds, num_steps + 1)
    return [start_step + round(num_steps * index / max(count - 1, 1)) for index in range(count)]


def _step_number(name: str, step: int | float, max_steps: int) -> int:
    """Return a step from its number, or from a share of all steps."""
    is_number = isinstance(step, (int, float)) and not isinstance(step, bool)
    is_step_or_share = is_number and (isinstance(step, int) or step <= 1 or step.is_integer())
    # The comparison is false for NaN.
    if not is_step_or_share or not step >= 0:
        raise StructPruneError(f"`{name}` must be a step, or a share of all steps from 0.0 to 1.0, got {step!r}.")

    if isinstance(step, float) and step <= 1:
        return round(max_steps * step)
    return int(step)
