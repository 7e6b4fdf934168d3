"""From the final widths to those of several steps, and when these steps are."""

from __future__ import annotations

from bisect import bisect_left

from transformers import PretrainedConfig

from ..arch.shrink import legal_sizes
from ..arch.spec import ArchSpec, Width, Widths
from ..config.pruning import StructPruneConfig
from ..errors import StructPruneError


def round_widths(config: StructPruneConfig, arch: ArchSpec, widths: Widths) -> list[Widths]:
    """The widths after each step, which keeps the same share of units as the step before; the last are `widths`."""
    steps: list[Widths] = []
    for number in range(1, config.rounds):
        share = number / config.rounds
        step: dict[str, Width] = {}
        for name, width in widths.items():
            sizes = arch.widths(name)
            if isinstance(width, int):
                step[name] = _on_the_way(share, max(sizes.values()), width)
            else:
                step[name] = {layer: _on_the_way(share, sizes[layer], final) for layer, final in width.items()}
        steps.append(step)
    return [*steps, widths]


def _on_the_way(share: float, size: int, width: int) -> int:
    return round(size * (width / size) ** share)


def legal_round_widths(
    config: StructPruneConfig, arch: ArchSpec, model_config: PretrainedConfig, widths: Widths
) -> list[Widths]:
    """`round_widths` for steps that each leave a model: a step between two legal widths goes to the larger."""
    legal = {name: legal_sizes(model_config, arch, name) for name in widths}

    def next_legal(name: str, width: Width) -> Width:
        if isinstance(width, int):
            return legal[name][bisect_left(legal[name], width)]
        return {layer: legal[name][bisect_left(legal[name], units)] for layer, units in width.items()}

    goals = round_widths(config, arch, widths)
    return [{name: next_legal(name, width) for name, width in goal.items()} for goal in goals]


def removal_steps(
    config: StructPruneConfig, start: int | float, end: int | float | None, every: int | None, max_steps: int
) -> list[int]:
    """The steps of a training after which units are removed."""
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
    return [first + round((last - first) * i / max(count - 1, 1)) for i in range(count)]


def _step_number(name: str, at: int | float, max_steps: int) -> int:
    number = isinstance(at, (int, float)) and not isinstance(at, bool)
    if not number or not at >= 0 or (isinstance(at, float) and at > 1 and not at.is_integer()):
        raise StructPruneError(f"{name} is a step, or a share of all steps from 0.0 to 1.0, got {at!r}.")
    return round(max_steps * at) if isinstance(at, float) and at <= 1 else int(at)
