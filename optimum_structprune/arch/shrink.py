"""Make the config of a smaller model, and find the sizes that a config class accepts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from copy import deepcopy
from math import ceil, lcm
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import PretrainedConfig

from ..system.errors import StructPruneError
from .per_layer import forget_modeling_file
from .spec import GROUP, HIDDEN, LAYER, VOCAB, ArchSpec, Widths
from .token_space import holds_token_ids, renumber_, resize_


# The grouped matrix product of transformers' experts requires rows whose size is a multiple of 16 bytes: 4 numbers in
# fp32, 8 in half precision. Widths inside experts are multiples of 8 in any dtype, so a cast never breaks a model.
EXPERT_MULTIPLE = 8
ROW_BYTES = 16

# Config keys that count layers from the first layer.
LAYER_COUNT_KEYS = ("max_window_layers", "first_k_dense_replace", "num_dense_layers")
# Config keys that list the indices of some layers.
LAYER_INDEX_KEYS = ("mlp_only_layers", "moe_layers", "attn_layer_indices")
# Lists that never have one entry per layer, even if their length is the number of layers.
OTHER_LIST_KEYS = re.compile("architectures|(mlp|ssm)_multipliers|mtp_layers_block_type|pos_att_type|time_step_limit")


def shrunk_config(
    config: PretrainedConfig, arch: ArchSpec, sizes: Widths, keep: Sequence[int] | None = None
) -> PretrainedConfig:
    """Return a copy of a config with new sizes.

    Where layers get different sizes, the config has the largest size, and `per_layer_config` has the smaller sizes.

    Args:
        config: The config of the model.
        arch: The description of the model.
        sizes: The new widths by space.
        keep: The indices of the kept layers, or the ids of the kept tokens; by default the first ones.

    Raises:
        StructPruneError: If the config class does not accept the sizes.
    """
    new_config = deepcopy(config)
    text = new_config.get_text_config()
    per_layer: dict[int, dict[str, Any]] = {}
    for layer, values in (text.to_dict().get("per_layer_config") or {}).items():
        per_layer[int(layer)] = dict(values)
    text.per_layer_config = None

    if LAYER in sizes:
        space = arch.of(LAYER)[0]
        layers = keep or range(space.width_in(sizes))
        cut_depth_(text, layers, space.size)
        per_layer = {index: per_layer[layer] for index, layer in enumerate(layers) if layer in per_layer}

    if VOCAB in sizes:
        space = arch.of(VOCAB)[0]
        tokens = keep or range(space.width_in(sizes))
        renumber_(new_config, tokens, space.size, only_shapes=keep is None)
        resize_(new_config, tokens, space.size)

    for name in sizes:
        for key, value in arch.of(name)[0].pins:
            setattr(text, key, value)
        _set_sizes_(text, per_layer, arch, name, sizes)

    if sizes:
        for key in layers_ahead(text):
            setattr(text, key, 0)
    _set_per_layer_(text, per_layer, arch)

    try:
        type(new_config).from_dict(new_config.to_dict())
    except (StrictDataclassError, ValueError) as error:
        raise StructPruneError(f"{arch.model_type} does not accept the sizes {dict(sizes)}: {error}") from error
    return new_config


def layers_ahead(config: PretrainedConfig) -> list[str]:
    """Return the keys of a text config that count layers for tokens farther ahead; transformers does not load them."""
    return [key for key in ("num_nextn_predict_layers", "mtp_num_hidden_layers") if getattr(config, key, None)]


def _set_sizes_(
    text: PretrainedConfig, per_layer: dict[int, dict[str, Any]], arch: ArchSpec, name: str, sizes: Widths
) -> None:
    """Set the sizes of a space in a text config, and of layers with smaller sizes in `per_layer`."""
    widths = {space.layer: space.width_in(sizes) for space in arch.of(name)}
    widest = max(widths.values())
    for key, per_unit in arch.of(name)[0].config:
        setattr(text, key, widest * per_unit)
        for layer, width in widths.items():
            values = per_layer.setdefault(layer, {})
            values.pop(key, None)
            if width < widest:
                values[key] = width * per_unit


def _set_per_layer_(text: PretrainedConfig, per_layer: dict[int, dict[str, Any]], arch: ArchSpec) -> None:
    """Set the values of the narrower layers in a text config."""
    vars(text).pop("allow_global_per_layer_attribute_access", None)
    differences = {layer: values for layer, values in per_layer.items() if values}
    if not differences:
        forget_modeling_file(text)
        return

    text.per_layer_config = differences  # type: ignore[assignment]  # keys may be numbers or strings

    head_keys: set[str] = set()
    for space in arch.spaces:
        if space.unit == GROUP:
            head_keys.update(key for key, _ in space.config)

    # Config classes and rotary embeddings read the head count from the model's config, but only to derive the head
    # dimension. A pinned `head_dim` overrides this.
    if any(not head_keys.isdisjoint(values) for values in differences.values()):
        text.allow_global_per_layer_attribute_access = True


def legal_sizes(config: PretrainedConfig, arch: ArchSpec, name: str) -> Sequence[int]:
    """Return the legal widths of the space `name`, ascending.

    A width is legal if a plain config can have it and the model runs with it. Each number of KV groups or heads is
    tried against the validation of the config class. Any number of channels, experts and layers is legal, except for
    the multiples that the grouped matrix product of experts needs; see `EXPERT_MULTIPLE`.

    Returns:
        A range if the number of widths may be very large, or else a list.
    """
    spaces = arch.of(name)
    space = max(spaces, key=lambda space: space.width)
    if space.unit == GROUP:
        return [size for size in range(space.min_size, space.width + 1) if _accepts(config, arch, {name: size})]

    step = _step(config, arch, name)
    smallest = ceil(space.min_size / step) * step
    if space.width % step == 0:
        return range(smallest, space.width + 1, step)

    widths = list(range(smallest, space.width, step))
    widths.append(space.width)
    return widths


def _step(config: PretrainedConfig, arch: ArchSpec, name: str) -> int:
    """Return the step between the legal widths of a space. They are multiples of the step."""
    spaces = arch.of(name)
    if name != HIDDEN:
        in_experts = any(space.experts is not None and space.inside for space in spaces)
        if in_experts:
            return EXPERT_MULTIPLE
        return 1

    # A class that refuses one channel less needs a multiple of the number of heads.
    text = config.get_text_config()
    step = 1
    if not _accepts(config, arch, {name: spaces[0].size - 1}):
        step = text.num_attention_heads

    if any(space.experts is not None for space in arch.spaces):
        itemsize = getattr(text.dtype or config.dtype, "itemsize", 4)
        step = lcm(step, max(ROW_BYTES // itemsize, 1))
    return step


def _accepts(config: PretrainedConfig, arch: ArchSpec, sizes: Widths) -> bool:
    """Return whether the class of a config accepts sizes."""
    try:
        shrunk_config(config, arch, sizes)
    except StructPruneError:
        return False
    return True


def cut_depth_(config: PretrainedConfig, keep: Sequence[int], size: int) -> None:
    """Cut the lists of a config with one entry per layer, and renumber the fields that name or count layers.

    A list with one entry per layer is recognized by its length, because transformers does not mark it.

    Args:
        config: The text config of a model.
        keep: The indices of the kept layers, ascending.
        size: The number of layers of the model.
    """
    for key, value in list(vars(config).items()):
        if key in LAYER_COUNT_KEYS and value is not None:
            setattr(config, key, sum(layer < value for layer in keep))
        elif key in LAYER_INDEX_KEYS and value is not None:
            setattr(config, key, [index for index, layer in enumerate(keep) if layer in value])
        elif OTHER_LIST_KEYS.fullmatch(key) or holds_token_ids(key):
            continue
        elif isinstance(value, (list, tuple)) and len(value) == size:
            setattr(config, key, type(value)(value[layer] for layer in keep))
