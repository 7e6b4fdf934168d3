"""The config of a smaller model, and which sizes a config class accepts."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from copy import deepcopy
from typing import TYPE_CHECKING

from huggingface_hub.errors import StrictDataclassError

from ..errors import StructPruneError
from .depth import cut_depth_
from .spec import HIDDEN, LAYER, ArchSpec


if TYPE_CHECKING:
    from transformers import PretrainedConfig

EXPERT_MULTIPLE = 8


def shrunk_config(
    config: PretrainedConfig,
    spec: ArchSpec,
    sizes: Mapping[str, int],
    biased: Collection[str] = (),
    blocks: Sequence[int] | None = None,
) -> PretrainedConfig:
    """A copy of `config` with new sizes.

    Args:
        config: The dense model's config.
        spec: Its description.
        sizes: New number of units, by name of the space.
        biased: Names of spaces whose projections get a bias.
        blocks: Blocks that stay, where `sizes` says how many; the first ones if it is not known yet.

    Raises:
        StructPruneError: If the config class refuses the sizes.
    """
    new = deepcopy(config)
    text = text_config(new)
    for name, size in sizes.items():
        space = spec.of(name)[0]
        for key, value in space.pins:
            setattr(text, key, value)
        if name == LAYER:
            cut_depth_(text, blocks or range(size), space.size)
        for key, per_unit in space.config:
            setattr(text, key, size * per_unit)
        if name in biased and space.bias_flag is not None:
            setattr(text, space.bias_flag, True)
    try:
        type(new).from_dict(new.to_dict())
    except (StrictDataclassError, ValueError) as error:
        raise StructPruneError(f"{spec.model_type} does not accept the sizes {dict(sizes)}: {error}") from error
    return new


def text_config(config: PretrainedConfig) -> PretrainedConfig:
    """The part of a multimodal model's config that describes its text model; a plain config as it is."""
    return getattr(config, "text_config", None) or config


def legal_sizes(config: PretrainedConfig, spec: ArchSpec, name: str) -> list[int]:
    """Every number of units that a plain config of this model can express for the space `name`, ascending.

    A space whose size is one config key alone (channels) takes any size. Where several keys go together (KV groups
    and heads), each size is tried against the config class's own validation. Widths inside experts are multiples of 8:
    the grouped matrix product that transformers runs experts with takes only rows of whole 16 bytes.
    """
    space = spec.of(name)[0]
    if space.experts is not None and not space.whole:
        return [size for size in range(1, space.size + 1) if size % EXPERT_MULTIPLE == 0 or size == space.size]
    if name == HIDDEN:
        # A class that refuses one channel less wants a multiple of the number of heads.
        step = 1 if _accepts(config, spec, {name: space.size - 1}) else text_config(config).num_attention_heads
        return list(range(step, space.size + 1, step))
    if len(space.config) == 1:
        return list(range(space.least, space.size + 1))
    return [size for size in range(space.least, space.size + 1) if _accepts(config, spec, {name: size})]


def _accepts(config: PretrainedConfig, spec: ArchSpec, sizes: Mapping[str, int]) -> bool:
    try:
        shrunk_config(config, spec, sizes)
    except StructPruneError:
        return False
    return True
