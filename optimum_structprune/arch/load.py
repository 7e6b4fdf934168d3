"""From a model to its `ArchSpec`: the family's templates, filled in and checked against the weights' shapes."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import TYPE_CHECKING

from torch import nn

from ..errors import StructPruneError
from .families import Family, Template, family_of
from .spec import ArchSpec, Axis, Space


if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

Shapes = Mapping[str, tuple[int, ...]]


def describe(model: PreTrainedModel) -> ArchSpec:
    """What may shrink in `model`.

    Raises:
        StructPruneError: If the model type is unknown, or a parameter does not have the shape that the family's
            description says; the message names the parameter and both numbers.
    """
    family = family_of(model.config.model_type)
    base = model.base_model_prefix
    prefix = f"{base}." if base and hasattr(model, base) else ""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    return resolve(family, model.config, shapes, prefix)


def block_list(model: nn.Module, spec: ArchSpec) -> nn.ModuleList:
    """The list of blocks of a model."""
    blocks = model.get_submodule(spec.blocks)
    if not isinstance(blocks, nn.ModuleList):
        raise StructPruneError(f"{spec.blocks} should be a list of blocks, found {type(blocks).__name__}.")
    return blocks


def resolve(family: Family, config: PretrainedConfig, shapes: Shapes, prefix: str = "") -> ArchSpec:
    """Fill in a family's templates for one model.

    Args:
        family: The description.
        config: The model's config; gives the head counts.
        shapes: Name and shape of every tensor in the state dict.
        prefix: Path of the base model inside the model, with the dot.
    """
    blocks = f"{prefix}{family.blocks}"
    own = [name for name in shapes if name.startswith(f"{blocks}.")]
    if not own:
        raise StructPruneError(f"A {config.model_type} model should have its blocks at {blocks!r}; nothing is there.")
    count = 1 + max(int(name[len(blocks) + 1 :].split(".")[0]) for name in own)
    sizes = [0] * count
    for name in own:
        sizes[int(name[len(blocks) + 1 :].split(".")[0])] += prod(shapes[name])
    units = _rows_per_unit(config)
    spaces = (
        _space(name, template, layer, f"{blocks}.{layer}.", shapes, units, family.transposed)
        for layer in range(count)
        for name, template in family.spaces.items()
    )
    return ArchSpec(
        model_type=config.model_type,
        blocks=blocks,
        block_params=tuple(sizes),
        spaces=tuple(space for space in spaces if space is not None),
        missing=tuple(family.missing.items()),
    )


def _rows_per_unit(config: PretrainedConfig) -> dict[str, int]:
    heads = config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return {"unit": 1, "kv": head_dim, "q": head_dim * (heads // groups)}


def _space(
    name: str,
    template: Template,
    layer: int,
    block: str,
    shapes: Shapes,
    units: Mapping[str, int],
    transposed: bool,
) -> Space | None:
    first, parts = next(iter(template.out.items()))
    weight = f"{block}{first}.weight"
    if weight not in shapes:
        return None
    rows = shapes[weight][1 if transposed else 0]
    size = rows // sum(units[part] for part in parts)
    out, into = [], []
    for module, parts in template.out.items():
        out += _axes(f"{block}{module}.weight", 1 if transposed else 0, parts, size, shapes, units)
        if f"{block}{module}.bias" in shapes:
            out += _axes(f"{block}{module}.bias", 0, parts, size, shapes, units)
    for module, parts in template.into.items():
        into += _axes(f"{block}{module}.weight", 0 if transposed else 1, parts, size, shapes, units)
    per_unit = {key: units["q"] // units["kv"] for key in template.also}
    return Space(
        name=name,
        layer=layer,
        size=size,
        out=tuple(out),
        into=tuple(into),
        config=((template.size, 1), *per_unit.items()),
        pins=tuple((key, units["kv"]) for key in template.pin),
        unit_params=sum(prod(shapes[axis.param]) // shapes[axis.param][axis.dim] * axis.block for axis in out + into),
        bias_flag=template.bias,
    )


def _axes(param: str, dim: int, parts: list[str], size: int, shapes: Shapes, units: Mapping[str, int]) -> list[Axis]:
    if param not in shapes:
        raise StructPruneError(f"{param} is missing; the description of this family expects it.")
    blocks = [units[part] for part in parts]
    if shapes[param][dim] != size * sum(blocks):
        raise StructPruneError(
            f"{param}: dimension {dim} is {shapes[param][dim]}, but {size} units of {sum(blocks)} make "
            f"{size * sum(blocks)}. The description of this family does not fit this model."
        )
    offsets = [size * sum(blocks[:i]) for i in range(len(blocks))]
    return [Axis(param, dim, block, offset) for block, offset in zip(blocks, offsets, strict=True)]
