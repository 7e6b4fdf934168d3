"""The config of a smaller model, and which sizes a config class accepts."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from copy import deepcopy
from typing import TYPE_CHECKING, Any

from huggingface_hub.errors import StrictDataclassError

from ..errors import StructPruneError
from ..modeling_file import forget_modeling_file
from .depth import cut_depth_
from .spec import HIDDEN, LAYER, ArchSpec, Widths


if TYPE_CHECKING:
    from transformers import PretrainedConfig

EXPERT_MULTIPLE = 8


def shrunk_config(
    config: PretrainedConfig,
    spec: ArchSpec,
    sizes: Widths,
    biased: Collection[str] = (),
    blocks: Sequence[int] | None = None,
) -> PretrainedConfig:
    """A copy of `config` with new sizes.

    Where blocks come out with different sizes, the config has the largest, and `per_layer_config` those of the blocks
    that have less.

    Args:
        config: The dense model's config.
        spec: Its description.
        sizes: New number of units, by kind of space: one number, or one per block.
        biased: Names of spaces whose projections get a bias.
        blocks: Blocks that stay, where `sizes` says how many; the first ones if it is not known yet.

    Raises:
        StructPruneError: If the config class refuses the sizes.
    """
    new = deepcopy(config)
    text = text_config(new)
    per_layer: dict[int, dict[str, Any]] = {
        int(layer): dict(values) for layer, values in (text.to_dict().get("per_layer_config") or {}).items()
    }
    text.per_layer_config = None
    if LAYER in sizes:
        space = spec.of(LAYER)[0]
        stay = blocks or range(space.width_in(sizes))
        cut_depth_(text, stay, space.size)
        per_layer = {place: per_layer[block] for place, block in enumerate(stay) if block in per_layer}
    for name in sizes:
        space = spec.of(name)[0]
        for key, value in space.pins:
            setattr(text, key, value)
        _set_sizes_(text, per_layer, spec, name, sizes)
        if name in biased and space.bias_flag is not None:
            setattr(text, space.bias_flag, True)
    _set_per_layer_(text, per_layer, spec)
    try:
        type(new).from_dict(new.to_dict())
    except (StrictDataclassError, ValueError) as error:
        raise StructPruneError(f"{spec.model_type} does not accept the sizes {dict(sizes)}: {error}") from error
    return new


def _set_sizes_(
    text: PretrainedConfig, per_layer: dict[int, dict[str, Any]], spec: ArchSpec, name: str, sizes: Widths
) -> None:
    widths = {space.layer: space.width_in(sizes) for space in spec.of(name)}
    most = max(widths.values())
    for key, per_unit in spec.of(name)[0].config:
        setattr(text, key, most * per_unit)
        for layer, width in widths.items():
            per_layer.setdefault(layer, {}).pop(key, None)
            if width < most:
                per_layer[layer][key] = width * per_unit


def _set_per_layer_(text: PretrainedConfig, per_layer: dict[int, dict[str, Any]], spec: ArchSpec) -> None:
    vars(text).pop("allow_global_per_layer_attribute_access", None)
    differing = {layer: values for layer, values in per_layer.items() if values}
    if not differing:
        forget_modeling_file(text)
        return
    text.per_layer_config = differing  # type: ignore[assignment]  # keys may be numbers or strings
    # Config classes and rotary embeddings read a head count, to derive what a pinned head_dim already says.
    heads = {key for space in spec.spaces if len(space.config) > 1 for key, _ in space.config}
    if any(key in heads for values in differing.values() for key in values):
        text.allow_global_per_layer_attribute_access = True


def text_config(config: PretrainedConfig) -> PretrainedConfig:
    """The part of a multimodal model's config that describes its text model; a plain config as it is."""
    return getattr(config, "text_config", None) or config


def legal_sizes(config: PretrainedConfig, spec: ArchSpec, name: str) -> list[int]:
    """Every number of units that a plain config of this model can express for the space `name`, ascending.

    A space whose size is one config key alone (channels) takes any size. Where several keys go together (KV groups
    and heads), each size is tried against the config class's own validation. Widths inside experts are multiples of 8:
    the grouped matrix product that transformers runs experts with takes only rows of whole 16 bytes.
    """
    space = max(spec.of(name), key=lambda space: space.width)
    if space.experts is not None and not space.whole:
        return [size for size in range(1, space.width + 1) if size % EXPERT_MULTIPLE == 0 or size == space.width]
    if name == HIDDEN:
        # A class that refuses one channel less wants a multiple of the number of heads.
        step = 1 if _accepts(config, spec, {name: space.size - 1}) else text_config(config).num_attention_heads
        return list(range(step, space.size + 1, step))
    if len(space.config) == 1:
        return list(range(space.least, space.width + 1))
    return [size for size in range(space.least, space.width + 1) if _accepts(config, spec, {name: size})]


def _accepts(config: PretrainedConfig, spec: ArchSpec, sizes: Widths) -> bool:
    try:
        shrunk_config(config, spec, sizes)
    except StructPruneError:
        return False
    return True
