"""Find the legal widths of the spaces of a model, and check whether its layers may differ."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from math import ceil, lcm
from typing import cast

from transformers import PretrainedConfig

from ..arch.shrink import legal_sizes
from ..arch.spec import CHANNEL, EXPERT, GROUP, TOKEN, ArchSpec, Space, Width, Widths
from ..config.pruning import AUTO, CACHE, FILE, StructPruneConfig
from ..system.errors import StructPruneError
from ..system.registry import did_you_mean


# The legal widths by kind of space, ascending.
LegalWidths = Mapping[str, Sequence[int]]
# The share of its units that every layer keeps if each layer gets its own width. Scores of different layers are not
# comparable enough to remove almost all units of a layer.
LEAST_KEPT = 0.1
# The multiple of a number of tokens with `round_to="auto"`.
TOKEN_MULTIPLE = 64
# The multiples of a number of channels with `round_to="auto"`. GPTQ and AWQ need 128 for groups of 128, and
# llama.cpp's K-quants need 256.
CHANNEL_MULTIPLES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
# The number of values in a block of llama.cpp's types. A row that is not a multiple of it is stored in 16 bits.
GGUF_BLOCK = 32
# The largest distance from a goal that such a multiple may cause, as a share of the layers' parameters.
MAX_DISTANCE = 0.01


def legal_widths(config: StructPruneConfig, arch: ArchSpec, model_config: PretrainedConfig) -> LegalWidths:
    """Return the legal widths of the spaces that a config names, by kind of space.

    Raises:
        StructPruneError: If the model has no such space, or the config asks for a width that is not legal.
    """
    legal = {name: legal_sizes(model_config, arch, name) for name in _named_spaces(config, arch)}
    widths = asked_widths(config, arch)
    if widths is not None:
        for name, width in widths.items():
            _check_width(arch, name, width, legal[name])
    return legal


def _named_spaces(config: StructPruneConfig, arch: ArchSpec) -> list[str]:
    """Return the spaces that a config names, or else the default spaces of the model."""
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
    """Return the spaces to prune if the config does not name any."""
    defaults = list(config.targets_or_default)
    needs_different_layers = config.allocation != "uniform" and CACHE not in (config.budget or {})

    names = []
    for name in defaults:
        spaces = arch.of(name)
        if spaces and not (needs_different_layers and spaces[0].uniform):
            names.append(name)
    return names or list(arch.channels) or defaults


def _check_offered(arch: ArchSpec, name: str) -> None:
    """Raise if a model does not offer a space."""
    if name in arch.offered:
        return

    reason = dict(arch.missing).get(name, "").removesuffix(".")
    if reason:
        reason = f": {reason}"
    raise StructPruneError(
        f"The model of type {arch.model_type!r} has no space {name!r} to prune{reason}."
        f"{did_you_mean(name, arch.offered)}"
    )


def _check_lengths(config: StructPruneConfig, arch: ArchSpec) -> None:
    """Raise if the length of a list of widths is not the number of layers."""
    for name, width in (config.widths or {}).items():
        if isinstance(width, list) and len(width) != arch.num_layers:
            raise StructPruneError(
                f"widths[{name!r}] has a list of length {len(width)}, and the model has {arch.num_layers} layers. "
                f"List one width for each, or name layers: {dict(enumerate(width))}."
            )


def _check_disjoint(config: StructPruneConfig, arch: ArchSpec, names: Sequence[str]) -> None:
    """Raise if removing units of one space would also remove units of another space."""
    model_kinds = [space.name for space in arch.model_spaces if space.name in names]
    if model_kinds and len(names) > 1:
        kind = model_kinds[0]
        raise StructPruneError(
            f"targets={list(names)} has {kind!r}, whose removal also removes units of the other targets, so neither "
            f"sparsity nor a budget says how much of each to remove. Target {kind!r} alone, or set `widths`."
        )

    expert_kinds = [name for name in names if not arch.of(name)[0].inside]
    inner_kinds = []
    for name in names:
        if name not in expert_kinds and arch.of(name)[0].experts is not None:
            inner_kinds.append(name)

    if expert_kinds and inner_kinds:
        raise StructPruneError(
            f"targets={list(names)} would remove whole experts and channels inside them, and neither "
            f"sparsity nor a budget says how much of each. Target {inner_kinds[0]!r}, which loses less, or "
            f"{expert_kinds[0]!r}, or set both widths."
        )


def _check_width(arch: ArchSpec, name: str, width: Width, legal: Sequence[int]) -> None:
    """Raise if a width, of all layers or by layer, is not legal."""
    sizes = arch.widths(name)
    if isinstance(width, int):
        _check_legal(arch, name, f"widths[{name!r}]", width, legal, max(sizes.values()))
        return

    for layer, layer_width in width.items():
        if layer not in sizes:
            raise StructPruneError(
                f"widths[{name!r}] names layer {layer}, which has no {name!r}. The layers that have it are "
                f"{min(sizes)} to {max(sizes)}."
            )
        _check_legal(arch, name, f"widths[{name!r}][{layer}]", layer_width, legal, sizes[layer])


def _check_legal(arch: ArchSpec, name: str, label: str, width: int, legal: Sequence[int], size: int) -> None:
    """Raise if a width is not legal for a space of this size."""
    allowed = legal[: bisect_right(legal, size)]
    if width in allowed:
        return

    index = bisect_left(allowed, width)
    nearest = " or ".join(str(choice) for choice in allowed[max(index - 1, 0) : index + 1])
    raise StructPruneError(
        f"{label} = {width} is not legal for this {arch.model_type} model, which has {arch.of(name)[0].size}. The "
        f"nearest legal choice is {nearest}."
    )


def asked_widths(config: StructPruneConfig, arch: ArchSpec) -> Widths | None:
    """Return the widths that a config states, or None. Equal widths of all layers become one number."""
    if config.widths is None:
        return None

    widths: dict[str, Width] = {}
    for name, value in config.widths.items():
        width = cast("Width", value)
        if isinstance(value, list):
            width = dict(enumerate(value))

        if isinstance(width, dict):
            names_all_layers = width.keys() == arch.widths(name).keys()
            if names_all_layers and len(set(width.values())) == 1:
                width = next(iter(width.values()))
        widths[name] = width

    return widths


def choices(config: StructPruneConfig, arch: ArchSpec, name: str, legal: Sequence[int]) -> Sequence[int]:
    """Return the widths of a space that `sparsity` or a budget may choose, ascending."""
    return multiples(legal, arch.of(name)[0].width, multiple_of(config, arch, name))


def smallest_widths(config: StructPruneConfig, arch: ArchSpec, legal: LegalWidths) -> Widths:
    """Return the smallest widths to choose from: one number, or one number per layer if layers may differ."""
    pruned = without_layers(arch, config.skip_layers, legal)
    has_own_widths = is_bounded(config, arch, list(legal))

    smallest: dict[str, Width] = {}
    for name, sizes in legal.items():
        if has_own_widths:
            widths = {}
            for space in pruned.of(name):
                widths[space.layer] = candidate_widths(config, pruned, space, sizes)[-1]
            smallest[name] = widths
            continue

        narrowest = choices(config, pruned, name, sizes)[0]
        smallest[name] = narrowest
        if config.skip_layers:
            smallest[name] = at_most(narrowest, pruned.of(name))

    return smallest


def candidate_widths(config: StructPruneConfig, arch: ArchSpec, space: Space, legal: Sequence[int]) -> list[int]:
    """Return the widths to choose from for one layer, descending. None of them is below `LEAST_KEPT` of its units."""
    layer_widths = [width for width in legal if width < space.width]
    layer_widths.append(space.width)

    rounded_widths = multiples(layer_widths, space.width, multiple_of(config, arch, space.kind))
    min_width = ceil(LEAST_KEPT * space.width)
    return [width for width in reversed(rounded_widths) if width >= min_width]


def multiple_of(config: StructPruneConfig, arch: ArchSpec, name: str) -> int:
    """Return the number whose multiples are chosen as widths of a space.

    It is `round_to` for channels and tokens, `tensor_parallel` for KV groups and experts, and 1 for layers. With
    `round_to="auto"`, half a step of channels is at most `MAX_DISTANCE` of the layers' parameters.
    """
    spaces = arch.of(name)
    unit = spaces[0].unit
    if unit in (GROUP, EXPERT):
        return config.tensor_parallel
    if unit not in (CHANNEL, TOKEN):
        return 1
    if config.round_to != AUTO:
        return int(config.round_to)
    if unit == TOKEN:
        return TOKEN_MULTIPLE

    params_per_channel = sum(space.unit_params * space.scale for space in spaces)
    max_multiple = 2 * MAX_DISTANCE * sum(arch.layer_params) / params_per_channel

    multiple = config.tensor_parallel
    if config.gguf is not None and FILE in (config.budget or {}):
        multiple = lcm(multiple, GGUF_BLOCK)
    for power in CHANNEL_MULTIPLES:
        if power * config.tensor_parallel <= max_multiple:
            multiple = lcm(multiple, power * config.tensor_parallel)
    return multiple


def multiples(legal: Sequence[int], size: int, multiple: int) -> Sequence[int]:
    """Return the legal widths that are multiples, and the full width. Without narrower multiples, return `legal`."""
    # A range may be too long for a list.
    if isinstance(legal, range):
        step = lcm(legal.step, multiple)
        narrower_range = range(ceil(legal.start / step) * step, size, step)
        if narrower_range and size % step == 0:
            return range(narrower_range[0], size + 1, step)
        narrower = list(narrower_range)
    else:
        narrower = [width for width in legal if width % multiple == 0 and width < size]

    if not narrower:
        return legal
    return narrower + [size]


def is_bounded(config: StructPruneConfig, arch: ArchSpec, names: Collection[str]) -> bool:
    """Return whether every layer gets its own width, which is at least `LEAST_KEPT` of its units.

    This is also the case with `allocation="uniform"` if the layers of the model differ and the config does not set
    widths.
    """
    if config.allocation != "uniform":
        return True
    return config.widths is None and not has_one_width(arch, names)


def has_one_width(arch: ArchSpec, names: Collection[str]) -> bool:
    """Return whether all layers have the same width in each of these kinds of space."""
    for name in names:
        widths = {space.width for space in arch.of(name)}
        if len(widths) != 1:
            return False
    return True


def check_may_differ(config: StructPruneConfig, arch: ArchSpec, names: Sequence[str]) -> None:
    """Raise if a config makes layers differ in a space that requires the same width in all layers."""
    if config.skip_layers:
        cause = f"skip_layers={list(config.skip_layers)}"
    elif config.allocation != "uniform":
        cause = f"allocation={config.allocation!r}"
    else:
        cause = f"widths={config.widths}"
        widths = asked_widths(config, arch) or {}
        names = [name for name, width in widths.items() if not isinstance(width, int)]

    for name in names:
        reason = arch.uniform or arch.of(name)[0].uniform
        if reason:
            raise StructPruneError(
                f"{cause} makes layers of different widths, which {name!r} of a {arch.model_type} model cannot have: "
                f"{reason}. Use `allocation='uniform'` without `skip_layers`, and one number per space in `widths`."
            )


def without_layers(arch: ArchSpec, layers: Sequence[int], names: Collection[str]) -> ArchSpec:
    """Return the description without the spaces of the skipped layers.

    Raises:
        StructPruneError: If a layer does not exist, or if all layers that have one of the spaces are skipped.
    """
    for layer in layers:
        if not 0 <= layer < arch.num_layers:
            raise StructPruneError(f"skip_layers names layer {layer}. The layers are 0 to {arch.num_layers - 1}.")

    pruned = replace(arch, spaces=tuple(space for space in arch.spaces if space.layer not in layers))
    for name in arch.names:
        if name in names and name not in pruned.names:
            raise StructPruneError(f"skip_layers={list(layers)} leaves no layer whose {name!r} could be pruned.")
    return pruned


def at_most(width: Width, spaces: Sequence[Space]) -> dict[int, int]:
    """Return a width by layer, limited to the current width of each layer."""
    widths = {}
    for space in spaces:
        widths[space.layer] = min(space.width_in({space.kind: width}), space.width)
    return widths
