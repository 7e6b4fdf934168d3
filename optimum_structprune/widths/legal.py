"""The widths that the spaces of a model may take, and whether its layers may differ."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from math import ceil, lcm
from typing import cast

from transformers import PretrainedConfig

from ..arch.shrink import legal_sizes
from ..arch.spec import CHANNEL, EXPERT, GROUP, TOKEN, ArchSpec, Space, Width, Widths
from ..config.pruning import AUTO, CACHE, StructPruneConfig
from ..errors import StructPruneError
from ..registry import did_you_mean


# The legal widths by kind of space, ascending.
LegalWidths = Mapping[str, Sequence[int]]
# The share of its units that every layer keeps where layers get widths of their own. Scores are not comparable enough
# between layers to empty one.
LEAST_KEPT = 0.1
# The multiple of a number of tokens with `round_to="auto"`.
TOKEN_MULTIPLE = 64
# The multiples of a number of channels with `round_to="auto"`. GPTQ and AWQ need 128 for
# groups of 128, and llama.cpp's K-quants need 256.
CHANNEL_MULTIPLES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
# The largest distance from a goal, in shares of the layers' parameters, that such a multiple may cause.
MAX_DISTANCE = 0.01


def legal_widths(config: StructPruneConfig, arch: ArchSpec, model_config: PretrainedConfig) -> LegalWidths:
    """Return the legal widths of the spaces that a config names, by kind of space.

    Raises:
        StructPruneError: If the model has no such space, or the config asks for a width that is not legal.
    """
    legal = {name: legal_sizes(model_config, arch, name) for name in _named_spaces(config, arch)}
    asked = asked_widths(config, arch)
    if asked is not None:
        for name, width in asked.items():
            _check_width(arch, name, width, legal[name])
    return legal


def _named_spaces(config: StructPruneConfig, arch: ArchSpec) -> list[str]:
    """Return the spaces that a config names, or those of the default that the model has."""
    if config.widths is not None:
        names = list(config.widths)
    elif config.targets is not None:
        names = list(config.targets)
    else:
        names = _default_spaces(config, arch)

    for name in names:
        _check_offered(arch, name)
    if config.widths is None:
        _check_disjoint(config, arch, names)
    else:
        _check_lengths(config, arch)
    return names


def _default_spaces(config: StructPruneConfig, arch: ArchSpec) -> list[str]:
    """Return the spaces that may shrink where the config names none."""
    defaults = list(config.targets_or_default)
    by_layer = config.allocation != "uniform" and CACHE not in (config.budget or {})
    names = []
    for name in defaults:
        if arch.of(name) and not (by_layer and arch.of(name)[0].uniform):
            names.append(name)
    return names or list(arch.channels) or defaults


def _check_offered(arch: ArchSpec, name: str) -> None:
    """Raise if a model has no such space."""
    if name in arch.offered:
        return
    reason = dict(arch.missing).get(name, "").removesuffix(".")
    because = f": {reason}" if reason else ""
    raise StructPruneError(
        f"The model of type {arch.model_type!r} has no space {name!r} to prune{because}."
        f"{did_you_mean(name, arch.offered)}"
    )


def _check_lengths(config: StructPruneConfig, arch: ArchSpec) -> None:
    """Raise if a list of widths has another length than the model has layers."""
    for name, width in (config.widths or {}).items():
        if isinstance(width, list) and len(width) != arch.num_layers:
            raise StructPruneError(
                f"widths[{name!r}] has a list of length {len(width)}, and the model has {arch.num_layers} layers; "
                f"list one width for each, or name layers: {dict(enumerate(width))}."
            )


def _check_disjoint(config: StructPruneConfig, arch: ArchSpec, names: Sequence[str]) -> None:
    """Raise if units of one space would remove units of another one."""
    wide = [space.name for space in arch.model_spaces if space.name in names]
    if wide and len(names) > 1:
        raise StructPruneError(
            f"targets={list(names)} has {wide[0]!r}, which takes a part of all the others with it, so neither "
            f"sparsity nor a budget says how much of each is to go; target {wide[0]!r} alone, or give widths."
        )

    experts = [name for name in names if not arch.of(name)[0].inside]
    inside = [name for name in names if name not in experts and arch.of(name)[0].experts is not None]
    if experts and inside:
        raise StructPruneError(
            f"targets={list(names)} would remove whole experts and channels inside them, and neither "
            f"sparsity nor a budget says how much of each; target {inside[0]!r}, which loses less, or "
            f"{experts[0]!r}, or give both widths."
        )


def _check_width(arch: ArchSpec, name: str, width: Width, legal: Sequence[int]) -> None:
    """Raise if a width, of all layers or by layer, is not legal."""
    sizes = arch.widths(name)
    if isinstance(width, int):
        _check_legal(arch, name, f"widths[{name!r}]", width, legal, max(sizes.values()))
        return
    for layer, units in width.items():
        if layer not in sizes:
            raise StructPruneError(
                f"widths[{name!r}] names layer {layer}, which has no {name!r}; the layers that have it are "
                f"{min(sizes)} to {max(sizes)}."
            )
        _check_legal(arch, name, f"widths[{name!r}][{layer}]", units, legal, sizes[layer])


def _check_legal(arch: ArchSpec, name: str, label: str, width: int, legal: Sequence[int], size: int) -> None:
    """Raise if a width is not legal for a space of this size."""
    allowed = legal[: bisect_right(legal, size)]
    if width in allowed:
        return
    place = bisect_left(allowed, width)
    nearest = " or ".join(str(choice) for choice in allowed[max(place - 1, 0) : place + 1])
    raise StructPruneError(
        f"{label} = {width} is not legal for this {arch.model_type} model, which has {arch.of(name)[0].size}; the "
        f"nearest legal choice is {nearest}."
    )


def asked_widths(config: StructPruneConfig, arch: ArchSpec) -> Widths | None:
    """Return the widths that a config states, or None. Equal widths of all layers become one number."""
    if config.widths is None:
        return None
    widths: dict[str, Width] = {}
    for name, given in config.widths.items():
        by_layer = dict(enumerate(given)) if isinstance(given, list) else given
        width = cast("Width", by_layer)
        if isinstance(width, dict) and width.keys() == arch.widths(name).keys() and len(set(width.values())) == 1:
            width = next(iter(width.values()))
        widths[name] = width
    return widths


def choices(config: StructPruneConfig, arch: ArchSpec, name: str, legal: Sequence[int]) -> Sequence[int]:
    """Return the widths of a space that `sparsity` or a budget may choose, ascending."""
    return multiples(legal, arch.of(name)[0].width, multiple_of(config, arch, name))


def smallest_widths(config: StructPruneConfig, arch: ArchSpec, legal: LegalWidths) -> Widths:
    """Return the smallest widths that may be chosen: one number, or one per layer where layers may differ."""
    smallest: dict[str, Width] = {}
    pruned = without_layers(arch, config.skip_layers, legal)
    for name, sizes in legal.items():
        narrowest = choices(config, pruned, name, sizes)[0]
        if is_bounded(config, arch, list(legal)):
            smallest[name] = {
                space.layer: candidate_widths(config, pruned, space, sizes)[-1] for space in pruned.of(name)
            }
        elif config.skip_layers:
            smallest[name] = at_most(narrowest, pruned.of(name))
        else:
            smallest[name] = narrowest
    return smallest


def candidate_widths(config: StructPruneConfig, arch: ArchSpec, space: Space, legal: Sequence[int]) -> list[int]:
    """Return the widths of a layer with a width of its own, descending, from `LEAST_KEPT` of its units on."""
    narrower = {width for width in legal if width < space.width}
    rounded = multiples(sorted({*narrower, space.width}), space.width, multiple_of(config, arch, space.kind))
    least = ceil(LEAST_KEPT * space.width)
    return [width for width in reversed(rounded) if width >= least]


def multiple_of(config: StructPruneConfig, arch: ArchSpec, name: str) -> int:
    """Return the number that chosen widths of a space are multiples of.

    It is `round_to` for channels and tokens, `tensor_parallel` for KV groups and experts, and 1 for layers. With
    `round_to="auto"`, half a step of channels is at most a hundredth of the layers' parameters, so that widths come as
    near as that to a goal.
    """
    spaces = arch.of(name)
    devices = config.tensor_parallel
    if spaces[0].unit not in (CHANNEL, TOKEN):
        return devices if spaces[0].unit in (GROUP, EXPERT) else 1
    if config.round_to != AUTO:
        return int(config.round_to)
    if spaces[0].unit == TOKEN:
        return TOKEN_MULTIPLE

    params_per_channel = sum(space.unit_params * space.scale for space in spaces)
    largest = 2 * MAX_DISTANCE * sum(arch.layer_params) / params_per_channel
    multiple = devices
    for power in CHANNEL_MULTIPLES:
        if power * devices <= largest:
            multiple = power * devices
    return multiple


def multiples(legal: Sequence[int], size: int, multiple: int) -> Sequence[int]:
    """Return the multiples among legal widths, and the full width; all legal widths if no multiple is narrower."""
    narrower: Sequence[int]
    if isinstance(legal, range):  # it may be too long for a list
        step = lcm(legal.step, multiple)
        narrower = range(ceil(legal.start / step) * step, size, step)
        if narrower and size % step == 0:
            return range(narrower[0], size + 1, step)
    else:
        narrower = [width for width in legal if width % multiple == 0 and width < size]
    return [*narrower, size] if narrower else legal


def is_bounded(config: StructPruneConfig, arch: ArchSpec, names: Collection[str]) -> bool:
    """Return whether every layer gets a width of its own, of at least `LEAST_KEPT` of its units.

    `allocation="uniform"` also gives each layer its own width if the layers of the model differ and the config states
    no widths.
    """
    if config.allocation != "uniform":
        return True
    return config.widths is None and not has_one_width(arch, names)


def has_one_width(arch: ArchSpec, names: Collection[str]) -> bool:
    """Return whether all layers have the same width in each of these kinds of space."""
    return all(len({space.width for space in arch.of(name)}) == 1 for name in names)


def check_may_differ(config: StructPruneConfig, arch: ArchSpec, names: Sequence[str]) -> None:
    """Raise if a config makes layers differ in a space that has one width in all layers."""
    if config.skip_layers:
        cause = f"skip_layers={list(config.skip_layers)}"
    elif config.allocation != "uniform":
        cause = f"allocation={config.allocation!r}"
    else:
        cause = f"widths={config.widths}"
        asked = asked_widths(config, arch) or {}
        names = [name for name, width in asked.items() if not isinstance(width, int)]

    for name in names:
        reason = arch.uniform or arch.of(name)[0].uniform
        if reason:
            raise StructPruneError(
                f"{cause} makes layers of different widths, which {name!r} of a {arch.model_type} model cannot have: "
                f"{reason}; use allocation='uniform' without skip_layers, and one number per space in widths."
            )


def without_layers(arch: ArchSpec, layers: Sequence[int], names: Collection[str]) -> ArchSpec:
    """Return the description without the spaces of some layers, in which nothing is removed.

    Raises:
        StructPruneError: If a layer does not exist, or no layer is left that has a space of each name.
    """
    for layer in layers:
        if not 0 <= layer < arch.num_layers:
            raise StructPruneError(f"skip_layers names layer {layer}; the layers are 0 to {arch.num_layers - 1}.")
    pruned = replace(arch, spaces=tuple(space for space in arch.spaces if space.layer not in layers))
    for name in arch.names:
        if name in names and name not in pruned.names:
            raise StructPruneError(f"skip_layers={list(layers)} leaves no layer whose {name!r} could be pruned.")
    return pruned


def at_most(width: Width, spaces: Sequence[Space]) -> dict[int, int]:
    """Return a width by layer, where no layer becomes wider than it is."""
    return {space.layer: min(space.width_in({space.kind: width}), space.width) for space in spaces}
