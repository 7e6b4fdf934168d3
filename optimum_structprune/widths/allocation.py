"""How much is removed where: from a share of the parameters, or given widths, to legal widths."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import cast

from torch import Tensor
from transformers import PretrainedConfig

from ..arch.shrink import legal_sizes, shrunk_config
from ..arch.spec import LAYER, ArchSpec, Space, Width, Widths
from ..config.pruning import ONE_WIDTH, StructPruneConfig
from ..errors import StructPruneError
from ..registry import did_you_mean
from .ranking import candidate_widths, multiples, ranked_widths


def target_widths(
    config: StructPruneConfig,
    arch: ArchSpec,
    model_config: PretrainedConfig,
    scores: Mapping[tuple[int, str], Tensor] | None = None,
    legal: Mapping[str, Sequence[int]] | None = None,
) -> Widths:
    """The final width of each space: one number, or one per layer where layers may differ."""
    legal = legal_widths(config, arch, model_config) if legal is None else legal
    same = alike(arch, legal)
    if not same and LAYER in legal and len(legal) > 1:
        raise StructPruneError(
            f"The layers of this {arch.model_type} model differ in width, and {LAYER!r} would number them anew; prune "
            f"{LAYER!r} in a run of its own."
        )
    check_may_differ(config, arch, list(legal))
    pruned = _without(arch, config.skip_layers)
    widths: Widths
    if is_bounded(config, arch, list(legal)):
        widths = ranked_widths(config, pruned, legal, scores or {})
    else:
        asked = asked_widths(config, arch)
        widths = asked or widths_for_sparsity(pruned, config.sparsity or 0.0, legal, config.round_to)
        if config.skip_layers or not same:
            widths = {name: _at_most(width, pruned.of(name)) for name, width in widths.items()}
    shrunk_config(model_config, arch, widths)
    return widths


def legal_widths(config: StructPruneConfig, arch: ArchSpec, model_config: PretrainedConfig) -> dict[str, list[int]]:
    """The legal widths of the spaces that a config names, ascending, by kind of space."""
    legal = {}
    for name in config.targets if config.widths is None else config.widths:
        if name not in arch.offered:
            reason = dict(arch.missing).get(name)
            raise StructPruneError(
                f"A {arch.model_type} model has no space {name!r} to prune"
                + (f": {reason}." if reason else f".{did_you_mean(name, arch.offered)}")
            )
        legal[name] = legal_sizes(model_config, arch, name)
    if config.widths is None:
        _check_disjoint(arch, list(legal))
    else:
        for name, width in config.widths.items():
            _check_width(arch, name, cast("Width", width), legal[name])
    return legal


def asked_widths(config: StructPruneConfig, arch: ArchSpec) -> Widths | None:
    """The widths that a config gives; numbers for single layers as one number where all layers get the same."""
    if config.widths is None:
        return None
    widths: dict[str, Width] = {}
    for name, width in config.widths.items():
        if isinstance(width, dict) and len({*width.values()}) == 1 and width.keys() == arch.widths(name).keys():
            widths[name] = next(iter(width.values()))
        else:
            widths[name] = cast("Width", width)
    return widths


def choices(config: StructPruneConfig, arch: ArchSpec, name: str, legal: Sequence[int]) -> list[int]:
    """The widths of a space that `sparsity` may choose, ascending: legal ones, of channels multiples of `round_to`."""
    space = arch.of(name)[0]
    return multiples(legal, space.width, config.round_to if space.rounds else 1)


def smallest_widths(config: StructPruneConfig, arch: ArchSpec, legal: Mapping[str, Sequence[int]]) -> Widths:
    """The smallest widths that `sparsity` may choose: one number, or one per layer where layers may differ."""
    smallest: dict[str, Width] = {}
    pruned = _without(arch, config.skip_layers)
    for name, sizes in legal.items():
        spaces, least = pruned.of(name), choices(config, arch, name, sizes)[0]
        if is_bounded(config, arch, list(legal)):
            smallest[name] = {space.layer: candidate_widths(config, space, sizes)[-1] for space in spaces}
        else:
            smallest[name] = _at_most(least, spaces) if config.skip_layers else least
    return smallest


def is_bounded(config: StructPruneConfig, arch: ArchSpec, names: Collection[str]) -> bool:
    """Whether layers get widths of their own of at least `min_width`, see `ranked_widths`.

    They do so with allocations of one width too where the model's layers differ in width already, unless `widths` says
    what each gets.
    """
    return config.allocation not in ONE_WIDTH or (config.widths is None and not alike(arch, names))


def alike(arch: ArchSpec, names: Collection[str]) -> bool:
    """Whether all layers have the same width in each of these kinds of space."""
    return all(len({space.width for space in arch.of(name)}) == 1 for name in names)


def check_may_differ(config: StructPruneConfig, arch: ArchSpec, names: Sequence[str]) -> None:
    """Refuse a config that makes layers of different widths where they have to be alike."""
    cause = f"skip_layers={list(config.skip_layers)}" if config.skip_layers else f"allocation={config.allocation!r}"
    if config.allocation in ONE_WIDTH and not config.skip_layers:
        names = [name for name, width in (asked_widths(config, arch) or {}).items() if not isinstance(width, int)]
        cause = f"widths={config.widths}"
    for name in names:
        if reason := arch.uniform or arch.of(name)[0].uniform:
            raise StructPruneError(
                f"{cause} makes layers of different widths, which {name!r} of a {arch.model_type} model cannot have: "
                f"{reason}; use allocation='uniform' without skip_layers, and one number per space in widths."
            )


def _without(arch: ArchSpec, layers: Sequence[int]) -> ArchSpec:
    """The description without the spaces of some layers, so that nothing is removed there."""
    for layer in layers:
        if not 0 <= layer < arch.num_layers:
            raise StructPruneError(f"skip_layers names layer {layer}; the layers are 0 to {arch.num_layers - 1}.")
    others = replace(arch, spaces=tuple(space for space in arch.spaces if space.layer not in layers))
    if lost := [name for name in arch.names if name not in others.names]:
        raise StructPruneError(f"skip_layers={list(layers)} leaves no layer whose {lost[0]!r} could be pruned.")
    return others


def _at_most(width: Width, spaces: Sequence[Space]) -> dict[int, int]:
    return {space.layer: min(space.width_in({space.kind: width}), space.width) for space in spaces}


def _check_disjoint(arch: ArchSpec, names: Sequence[str]) -> None:
    of_model = [space.name for space in arch.model_spaces if space.name in names]
    if of_model and len(names) > 1:
        raise StructPruneError(
            f"targets={names} has {of_model[0]!r}, which takes a part of all the others with it, so sparsity does not "
            f"say how much of each is to go; target {of_model[0]!r} alone, or give widths."
        )
    experts = [name for name in names if not arch.of(name)[0].inside]
    inside = [name for name in names if name not in experts and arch.of(name)[0].experts is not None]
    if experts and inside:
        raise StructPruneError(
            f"targets={list(names)} would remove whole experts and channels inside them, and sparsity does not say "
            f"how much of each; target one of {', '.join(experts + inside)}, or give both widths."
        )


def _check_width(arch: ArchSpec, name: str, width: Width, legal: Sequence[int]) -> None:
    full = arch.widths(name)
    by_layer = {None: width} if isinstance(width, int) else dict(width)
    for layer, units in by_layer.items():
        if layer is not None and layer not in full:
            raise StructPruneError(
                f"widths[{name!r}] names layer {layer}, which has no {name!r}; the layers that have it are "
                f"{min(full)} to {max(full)}."
            )
        most = max(full.values()) if layer is None else full[layer]
        allowed = [size for size in legal if size <= most]
        if units in allowed:
            continue
        nearest = [size for size in allowed if size < units][-1:] + [size for size in allowed if size > units][:1]
        where = "" if layer is None else f"[{layer}]"
        raise StructPruneError(
            f"widths[{name!r}]{where} = {units} is not legal for this {arch.model_type} model, which has "
            f"{arch.of(name)[0].size}; the nearest legal choice is {' or '.join(map(str, nearest))}."
        )


def widths_for_sparsity(
    arch: ArchSpec, sparsity: float, legal: Mapping[str, Sequence[int]], round_to: int
) -> dict[str, int]:
    """Widths that remove a share of the layers' parameters.

    Spaces are taken in the order of the cost of their units, the largest first. Each gets the smallest legal width
    that is not below its proportional share, unless the later ones could not make up for it. The last one absorbs what
    is then still to be removed, to the nearest multiple of `round_to`.
    """
    goal = sparsity * sum(arch.layer_params)
    size = {name: arch.of(name)[0].size for name in legal}
    cost = {name: sum(space.unit_params * space.scale for space in arch.of(name)) for name in legal}
    rounds = {name: arch.of(name)[0].rounds for name in legal}
    choices = {name: multiples(legal[name], size[name], round_to if rounds[name] else 1) for name in legal}
    most = {name: cost[name] * (size[name] - choices[name][0]) for name in legal}
    if goal > sum(most.values()):
        raise StructPruneError(
            f"sparsity={sparsity} is more than {', '.join(legal)} can give: at most "
            f"{sum(most.values()) / sum(arch.layer_params):.3f} of the layers' parameters; lower it or add targets."
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
