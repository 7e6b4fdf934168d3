"""From a model to its `ArchSpec`: the family's templates, filled in and checked against the weights' shapes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from ..errors import StructPruneError
from .families import TEXT_ONLY, UNDESCRIBED, Family, family_of
from .shrink import text_config
from .spaces import Shapes, meets, spaces_of
from .spec import HIDDEN, LAYER, MODEL, WHOLE, ArchSpec, Space
from .stream import stream_of


if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


TWO_HALVES = "what is not text writes to this stream too"


def describe(model: PreTrainedModel, arch_file: str | Path | None = None) -> ArchSpec:
    """What may shrink in `model`.

    Args:
        model: The model; its parameters may be on the meta device.
        arch_file: Descriptions of your own, see `families.yaml`.

    Raises:
        StructPruneError: If the model type is unknown, or a parameter does not have the shape that the family's
            description says; the message names the parameter and both numbers.
    """
    config = model.config
    base = model.base_model_prefix
    prefix = f"{base}." if base and hasattr(model, base) else ""
    family = family_of(config.model_type, arch_file)
    if family.text is not None:
        config, prefix = text_config(config), f"{prefix}{family.text}."
        family = family_of(config.model_type, arch_file)
        family = replace(family, hidden=None, missing={**family.missing, HIDDEN: TWO_HALVES})
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    spec = resolve(family, config, shapes, prefix)
    if config is model.config:
        return spec
    return replace(spec, model_type=model.config.model_type, uniform=TEXT_ONLY)


def block_list(model: nn.Module, spec: ArchSpec) -> list[nn.Module]:
    """The blocks of a model, over all lists that hold them."""
    return [block for path in dict.fromkeys([spec.blocks, *dict(spec.stacks)]) for block in _blocks_at(model, path)]


def put_blocks_(model: nn.Module, spec: ArchSpec, blocks: Iterable[nn.Module]) -> None:
    """Put other blocks, fewer perhaps, in the place of those of a model that has one list of them."""
    modules = _blocks_at(model, spec.blocks)
    del modules[:]
    modules.extend(blocks)


def put_block_(model: nn.Module, spec: ArchSpec, layer: int, block: nn.Module) -> None:
    """Put a module in the place of a block."""
    path, index = spec.place(layer)
    _blocks_at(model, path)[index] = block


def _blocks_at(model: nn.Module, path: str) -> nn.ModuleList:
    blocks = model.get_submodule(path)
    if not isinstance(blocks, nn.ModuleList):
        raise StructPruneError(f"{path} should be a list of blocks, found {type(blocks).__name__}.")
    return blocks


def resolve(family: Family, config: PretrainedConfig, shapes: Shapes, prefix: str = "") -> ArchSpec:
    """Fill in a family's templates for one model.

    Args:
        family: The description.
        config: The model's config; gives the head counts.
        shapes: Name and shape of every tensor in the state dict.
        prefix: Path of the base model inside the model, with the dot.
    """
    stacks: list[tuple[str, int]] = []
    sizes: list[int] = []
    found: list[Space] = []
    for path in family.blocks:
        blocks = f"{prefix}{path}"
        own = _sizes(blocks, shapes)
        if not own:
            raise StructPruneError(
                f"A {config.model_type} model should have its blocks at {blocks!r}; nothing is there."
            )
        for index in range(len(own)):
            for name, template in family.spaces.items():
                if template.within in (None, path):
                    layer = len(sizes) + index
                    own_config = config.per_layer_config[layer] if config.is_heterogeneous else config
                    found += spaces_of(name, template, layer, f"{blocks}.{index}.", shapes, own_config)
        stacks.append((blocks, len(own)))
        sizes += own
    places = [f"{path}.{index}." for path, count in stacks for index in range(count)]
    stream = stream_of(family.hidden, shapes, config, prefix, places) if family.hidden is not None else None
    return ArchSpec(
        model_type=config.model_type,
        blocks=stacks[0][0],
        block_params=tuple(sizes),
        spaces=tuple(found),
        missing=(*family.missing.items(), *_refused(family, config)),
        stacks=tuple(stacks),
        causal=family.causal,
        wide=(*_depth(family, config, sizes), *([] if stream is None else [stream.space])),
        stream=stream,
        uniform="" if config.model_type in family.block_class else family.uniform or UNDESCRIBED,
    )


def _depth(family: Family, config: PretrainedConfig, sizes: list[int]) -> Iterator[Space]:
    if family.layer is not None and meets(config, family.layer):
        key, count = family.layer.size, len(sizes)
        mean = round(sum(sizes) / count)
        yield Space(
            LAYER, MODEL, count, (), (), config=((key, 1),), pins=(), unit_params=mean, whole=True, uniform=WHOLE
        )


def _sizes(blocks: str, shapes: Shapes) -> list[int]:
    sizes: dict[int, int] = {}
    for name, shape in shapes.items():
        if name.startswith(f"{blocks}."):
            index = int(name[len(blocks) + 1 :].split(".")[0])
            sizes[index] = sizes.get(index, 0) + prod(shape)
    return [sizes[index] for index in sorted(sizes)]


def _refused(family: Family, config: PretrainedConfig) -> list[tuple[str, str]]:
    return [
        (name, f"it takes {key} = {' or '.join(map(str, values))}, and this config has {getattr(config, key, None)}")
        for name, template in (*family.spaces.items(), (LAYER, family.layer))
        if template is not None
        for key, values in template.requires.items()
        if getattr(config, key, None) not in values
    ]
