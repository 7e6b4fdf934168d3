"""From a model to its `ArchSpec`: the family's templates, filled in and checked against the weights' shapes."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

from torch import nn

from ..errors import StructPruneError
from .families import Family, family_of
from .spaces import Shapes, spaces_of
from .spec import ArchSpec


if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


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
    found = [
        space
        for layer in range(count)
        for name, template in family.spaces.items()
        for space in spaces_of(name, template, layer, f"{blocks}.{layer}.", shapes, config)
    ]
    return ArchSpec(
        model_type=config.model_type,
        blocks=blocks,
        block_params=tuple(sizes),
        spaces=tuple(found),
        missing=(*family.missing.items(), *_refused(family, config)),
    )


def _refused(family: Family, config: PretrainedConfig) -> list[tuple[str, str]]:
    return [
        (name, f"it takes {key} = {' or '.join(map(str, values))}, and this config has {getattr(config, key, None)}")
        for name, template in family.spaces.items()
        for key, values in template.requires.items()
        if getattr(config, key, None) not in values
    ]
