"""The config of a smaller model, and which sizes a config class accepts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from copy import deepcopy
from math import ceil, lcm
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import PretrainedConfig

from ..errors import StructPruneError
from .per_layer import forget_modeling_file
from .spec import GROUP, HIDDEN, LAYER, VOCAB, ArchSpec, Widths
from .token_space import holds_token_ids, renumber_, resize_


# The grouped matrix product that transformers runs experts with takes only rows of whole 16 bytes: 4 numbers in fp32,
# 8 in half precision. Widths inside experts are multiples of 8 in any dtype, so that a cast never breaks a model.
EXPERT_MULTIPLE = 8
# Config keys that change with the number of layers: those that count layers from the first one,
LAYER_COUNT_KEYS = ("max_window_layers", "first_k_dense_replace", "num_dense_layers")
# those that list the indices of some layers,
LAYER_INDEX_KEYS = ("mlp_only_layers", "moe_layers", "attn_layer_indices")
# and lists that never have one entry per layer, even where they happen to be as long.
OTHER_LIST_KEYS = re.compile("architectures|(mlp|ssm)_multipliers|mtp_layers_block_type|pos_att_type|time_step_limit")


def shrunk_config(
    config: PretrainedConfig, arch: ArchSpec, sizes: Widths, stay: Sequence[int] | None = None
) -> PretrainedConfig:
    """A copy of `config` with new sizes.

    Where layers get different sizes, the config has the largest, and `per_layer_config` those of the layers that have
    less. `stay` are the layers or the tokens that stay; None stands for the first ones.
    """
    new = deepcopy(config)
    text = new.get_text_config()
    per_layer: dict[int, dict[str, Any]] = {
        int(layer): dict(values) for layer, values in (text.to_dict().get("per_layer_config") or {}).items()
    }
    text.per_layer_config = None
    if LAYER in sizes:
        space = arch.of(LAYER)[0]
        layers = stay or range(space.width_in(sizes))
        cut_depth_(text, layers, space.size)
        per_layer = {place: per_layer[layer] for place, layer in enumerate(layers) if layer in per_layer}
    if VOCAB in sizes:
        space = arch.of(VOCAB)[0]
        keep = stay or range(space.width_in(sizes))
        renumber_(new, keep, space.size, only_shapes=stay is None)
        resize_(new, keep, space.size)
    for name in sizes:
        space = arch.of(name)[0]
        for key, value in space.pins:
            setattr(text, key, value)
        _set_sizes_(text, per_layer, arch, name, sizes)
    for key in layers_ahead(text) if sizes else ():
        setattr(text, key, 0)
    _set_per_layer_(text, per_layer, arch)
    try:
        type(new).from_dict(new.to_dict())
    except (StrictDataclassError, ValueError) as error:
        raise StructPruneError(f"{arch.model_type} does not accept the sizes {dict(sizes)}: {error}") from error
    return new


def layers_ahead(config: PretrainedConfig) -> list[str]:
    """The keys of a text config that count layers for tokens farther ahead; transformers does not load them."""
    return [key for key in ("num_nextn_predict_layers", "mtp_num_hidden_layers") if getattr(config, key, None)]


def _set_sizes_(
    text: PretrainedConfig, per_layer: dict[int, dict[str, Any]], arch: ArchSpec, name: str, sizes: Widths
) -> None:
    widths = {space.layer: space.width_in(sizes) for space in arch.of(name)}
    widest = max(widths.values())
    for key, per_unit in arch.of(name)[0].config:
        setattr(text, key, widest * per_unit)
        for layer, width in widths.items():
            per_layer.setdefault(layer, {}).pop(key, None)
            if width < widest:
                per_layer[layer][key] = width * per_unit


def _set_per_layer_(text: PretrainedConfig, per_layer: dict[int, dict[str, Any]], arch: ArchSpec) -> None:
    vars(text).pop("allow_global_per_layer_attribute_access", None)
    differing = {layer: values for layer, values in per_layer.items() if values}
    if not differing:
        forget_modeling_file(text)
        return
    text.per_layer_config = differing  # type: ignore[assignment]  # keys may be numbers or strings
    # Config classes and rotary embeddings read the head count from the model's config, though only to derive the head
    # dimension, which a pinned head_dim already gives.
    heads = {key for space in arch.spaces if space.unit == GROUP for key, _ in space.config}
    if any(key in heads for values in differing.values() for key in values):
        text.allow_global_per_layer_attribute_access = True


def legal_sizes(config: PretrainedConfig, arch: ArchSpec, name: str) -> Sequence[int]:
    """The legal widths of the space `name`, ascending: a plain config can express them, and the model runs with them.

    They are a range where there may be very many. Each number of KV groups or heads is tried against the config
    class's own validation. Any number of channels, experts and layers is legal, but for what the grouped matrix
    product of experts takes; see `EXPERT_MULTIPLE`.
    """
    spaces = arch.of(name)
    space = max(spaces, key=lambda space: space.width)
    if space.unit == GROUP:
        return [size for size in range(space.min_size, space.width + 1) if _accepts(config, arch, {name: size})]
    step = 1
    if name == HIDDEN:
        # A class that refuses one channel less wants a multiple of the number of heads.
        step = 1 if _accepts(config, arch, {name: space.size - 1}) else config.get_text_config().num_attention_heads
        if any(other.experts is not None for other in arch.spaces):
            step = lcm(step, max(16 // getattr(config.get_text_config().dtype or config.dtype, "itemsize", 4), 1))
    elif any(other.experts is not None and other.inside for other in spaces):
        step = EXPERT_MULTIPLE
    narrower = range(ceil(space.min_size / step) * step, space.width, step)
    return [*narrower, space.width] if space.width % step else range(narrower.start, space.width + 1, step)


def _accepts(config: PretrainedConfig, arch: ArchSpec, sizes: Widths) -> bool:
    try:
        shrunk_config(config, arch, sizes)
    except StructPruneError:
        return False
    return True


def cut_depth_(config: PretrainedConfig, keep: Sequence[int], size: int) -> None:
    """Cut the lists of a config with one entry per layer, and renumber the fields that name or count layers.

    Such a list is recognised by its length; transformers marks it in no other way.
    """
    for key, value in list(vars(config).items()):
        if key in LAYER_COUNT_KEYS and value is not None:
            setattr(config, key, sum(layer < value for layer in keep))
        elif key in LAYER_INDEX_KEYS and value is not None:
            setattr(config, key, [place for place, layer in enumerate(keep) if layer in value])
        elif OTHER_LIST_KEYS.fullmatch(key) or holds_token_ids(key):
            continue
        elif isinstance(value, (list, tuple)) and len(value) == size:
            setattr(config, key, type(value)(value[layer] for layer in keep))
