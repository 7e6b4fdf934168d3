"""From the final widths to the steps of several rounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ..arch.shrink import legal_sizes
from ..arch.spec import ArchSpec, Widths
from ..config.pruning import StructPruneConfig


if TYPE_CHECKING:
    from transformers import PretrainedConfig


def next_legal(config: PretrainedConfig, arch: ArchSpec, widths: Widths) -> dict[str, int | Mapping[int, int]]:
    """The least legal widths that are not below `widths`; a step on the way to a target may lie between two."""
    found: dict[str, int | Mapping[int, int]] = {}
    for name, width in widths.items():
        legal = legal_sizes(config, arch, name)
        if isinstance(width, int):
            found[name] = _not_below(width, legal)
        else:
            found[name] = {layer: _not_below(least, legal) for layer, least in width.items()}
    return found


def _not_below(width: int, legal: Sequence[int]) -> int:
    return min(size for size in legal if size >= width)


def round_widths(
    config: StructPruneConfig, arch: ArchSpec, widths: Widths
) -> list[dict[str, int | Mapping[int, int]]]:
    """The widths after each round; the last are `widths`.

    After the share t of the rounds, `linear` has removed t of what is to go, `geometric` keeps the same ratio per
    round, and `cubic` removes `1 - (1 - t)³` (Zhu & Gupta 2017, eq. 1).
    """
    steps: list[dict[str, int | Mapping[int, int]]] = []
    for number in range(1, config.rounds):
        t = number / config.rounds
        step: dict[str, int | Mapping[int, int]] = {}
        for name, width in widths.items():
            sizes = arch.widths(name)
            if isinstance(width, int):
                step[name] = _on_the_way(config.schedule, t, max(sizes.values()), width)
            else:
                step[name] = {at: _on_the_way(config.schedule, t, sizes[at], least) for at, least in width.items()}
        steps.append(step)
    return [*steps, dict(widths)]


def _on_the_way(schedule: str, t: float, size: int, width: int) -> int:
    """The width after the share t of the rounds."""
    fraction = {
        "linear": t,
        "cubic": 1 - (1 - t) ** 3,
        "geometric": (1 - (width / size) ** t) / (1 - width / size) if width < size else 1.0,
    }[schedule]
    return round(size - fraction * (size - width))
