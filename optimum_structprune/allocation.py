"""How much is removed where: from a budget to widths, and from a width to the steps of several rounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from .arch.shrink import legal_sizes, shrunk_config
from .arch.spec import ArchSpec
from .config import StructPruneConfig
from .errors import StructPruneError
from .registry import did_you_mean


if TYPE_CHECKING:
    from transformers import PretrainedConfig


def target_widths(config: StructPruneConfig, spec: ArchSpec, model_config: PretrainedConfig) -> dict[str, int]:
    """The final number of units of each space, the same in every block.

    Raises:
        StructPruneError: If a space is not there, a width is not legal (the nearest legal ones are named), or the
            sparsity cannot be reached.
    """
    wanted = config.widths if config.widths is not None else dict.fromkeys(config.targets)
    legal = {}
    for name in wanted:
        if name not in spec.offered:
            reason = dict(spec.missing).get(name)
            raise StructPruneError(
                f"A {spec.model_type} model has no space {name!r} to prune"
                + (f": {reason}." if reason else f".{did_you_mean(name, spec.offered)}")
            )
        legal[name] = legal_sizes(model_config, spec, name)
    if config.widths is None:
        _check_disjoint(spec, list(wanted))
        widths = widths_for_sparsity(spec, float(config.sparsity or 0), legal, config.round_to)
    else:
        for name, width in config.widths.items():
            _check_width(spec, name, width, legal[name])
        widths = dict(config.widths)
    shrunk_config(model_config, spec, widths)
    return widths


def _check_disjoint(spec: ArchSpec, names: Sequence[str]) -> None:
    wide = [space.name for space in spec.wide if space.name in names]
    if wide and len(names) > 1:
        raise StructPruneError(
            f"targets={names} has {wide[0]!r}, which takes a part of all the others with it, so sparsity does not say "
            f"how much of each is to go; target {wide[0]!r} alone, or give widths."
        )
    whole = [name for name in names if spec.of(name)[0].whole]
    inside = [name for name in names if name not in whole and spec.of(name)[0].experts is not None]
    if whole and inside:
        raise StructPruneError(
            f"targets={list(names)} would remove whole experts and channels inside them, and sparsity does not say "
            f"how much of each; target one of {', '.join(whole + inside)}, or give both widths."
        )


def _check_width(spec: ArchSpec, name: str, width: int, legal: Sequence[int]) -> None:
    if width in legal:
        return
    below = [size for size in legal if size < width][-1:]
    above = [size for size in legal if size > width][:1]
    nearest = " or ".join(map(str, below + above))
    raise StructPruneError(
        f"widths[{name!r}] = {width} is not legal for this {spec.model_type} model, which has "
        f"{spec.of(name)[0].size}; the nearest legal choice is {nearest}."
    )


def widths_for_sparsity(
    spec: ArchSpec, sparsity: float, legal: Mapping[str, Sequence[int]], round_to: int
) -> dict[str, int]:
    """Widths that remove a share of the blocks' parameters.

    Spaces come coarsest unit first. Each takes the smallest legal width that is not below its proportional share,
    unless the finer ones could not make up for it, and the finest one absorbs what is then still to be removed, to the
    nearest multiple of `round_to`.

    Args:
        spec: The model.
        sparsity: Share of the blocks' parameters to remove.
        legal: Legal widths, ascending, by space.
        round_to: Multiple for spaces whose unit is a single channel.
    """
    goal = sparsity * sum(spec.block_params)
    size = {name: spec.of(name)[0].size for name in legal}
    cost = {name: sum(space.unit_params * space.scale for space in spec.of(name)) for name in legal}
    single = {name: spec.of(name)[0].single for name in legal}
    choices = {name: _rounded(legal[name], size[name], round_to if single[name] else 1) for name in legal}
    most = {name: cost[name] * (size[name] - choices[name][0]) for name in legal}
    if goal > sum(most.values()):
        raise StructPruneError(
            f"sparsity={sparsity} is more than {', '.join(legal)} can give: at most "
            f"{sum(most.values()) / sum(spec.block_params):.3f} of the blocks' parameters; lower it or add targets."
        )
    order = sorted(legal, key=lambda name: -cost[name])
    widths: dict[str, int] = {}
    for position, name in enumerate(order):
        rest = order[position + 1 :]
        ideal = size[name] * (1 - goal / sum(cost[other] * size[other] for other in [name, *rest]))
        if rest:
            room = sum(most[other] for other in rest)
            fitting = [width for width in choices[name] if goal - cost[name] * (size[name] - width) <= room]
            widths[name] = next((width for width in fitting if width >= ideal), fitting[-1])
        else:
            widths[name] = min(choices[name], key=lambda width: abs(width - ideal))
        goal -= cost[name] * (size[name] - widths[name])
    return widths


def _rounded(legal: Sequence[int], size: int, multiple: int) -> list[int]:
    multiples = [width for width in legal if width % multiple == 0 and width < size]
    return [*multiples, size] if multiples else list(legal)


def next_legal(config: PretrainedConfig, spec: ArchSpec, widths: Mapping[str, int]) -> dict[str, int]:
    """The least legal widths that are not below `widths`; a step on the way to a target may lie between two."""
    return {
        name: min(size for size in legal_sizes(config, spec, name) if size >= width) for name, width in widths.items()
    }


def round_widths(config: StructPruneConfig, spec: ArchSpec, widths: Mapping[str, int]) -> list[dict[str, int]]:
    """The widths after each round; the last are `widths`.

    After the share t of the rounds, `linear` has removed t of what is to go, `geometric` keeps the same ratio per
    round, and `cubic` removes `1 - (1 - t)³` (Zhu & Gupta 2017, eq. 1).
    """
    steps = []
    for number in range(1, config.rounds + 1):
        t = number / config.rounds
        step = {}
        for name, width in widths.items():
            size = spec.of(name)[0].size
            fraction = {
                "linear": t,
                "cubic": 1 - (1 - t) ** 3,
                "geometric": (1 - (width / size) ** t) / (1 - width / size) if width < size else 1.0,
            }[config.schedule]
            step[name] = width if number == config.rounds else round(size - fraction * (size - width))
        steps.append(step)
    return steps
