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
from .residual import residual_of
from .shrink import text_config
from .spaces import Shapes, meets, spaces_of
from .spec import HIDDEN, LAYER, MODEL, WHOLE, ArchSpec, Space


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
    arch = resolve(family, config, shapes, prefix)
    if config is model.config:
        return arch
    return replace(arch, model_type=model.config.model_type, uniform=TEXT_ONLY)


def layer_list(model: nn.Module, arch: ArchSpec) -> list[nn.Module]:
    """The layers of a model, over all lists that hold them."""
    return [
        layer for path in dict.fromkeys([arch.layer_path, *dict(arch.stacks)]) for layer in _layers_at(model, path)
    ]


def put_layers_(model: nn.Module, arch: ArchSpec, layers: Iterable[nn.Module]) -> None:
    """Put other layers, fewer perhaps, in the place of those of a model that has one list of them."""
    modules = _layers_at(model, arch.layer_path)
    del modules[:]
    modules.extend(layers)


def put_layer_(model: nn.Module, arch: ArchSpec, layer: int, module: nn.Module) -> None:
    """Put a module in the place of a layer."""
    path, index = arch.place(layer)
    _layers_at(model, path)[index] = module


def _layers_at(model: nn.Module, path: str) -> nn.ModuleList:
    layers = model.get_submodule(path)
    if not isinstance(layers, nn.ModuleList):
        raise StructPruneError(f"{path} should be a list of layers, found {type(layers).__name__}.")
    return layers


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
    for path in family.layer_paths:
        full_path = f"{prefix}{path}"
        own = _sizes(full_path, shapes)
        if not own:
            raise StructPruneError(
                f"A {config.model_type} model should have its layers at {full_path!r}; nothing is there."
            )
        for index in range(len(own)):
            for name, template in family.spaces.items():
                if template.within in (None, path):
                    layer = len(sizes) + index
                    own_config = config.per_layer_config[layer] if config.is_heterogeneous else config
                    found += spaces_of(name, template, layer, f"{full_path}.{index}.", shapes, own_config)
        stacks.append((full_path, len(own)))
        sizes += own
    places = [f"{path}.{index}." for path, count in stacks for index in range(count)]
    stream = residual_of(family.hidden, shapes, config, prefix, places) if family.hidden is not None else None
    return ArchSpec(
        model_type=config.model_type,
        layer_path=stacks[0][0],
        layer_params=tuple(sizes),
        spaces=tuple(found),
        missing=(*family.missing.items(), *_refused(family, config)),
        stacks=tuple(stacks),
        causal=family.causal,
        model_spaces=(*_depth(family, config, sizes), *([] if stream is None else [stream.space])),
        stream=stream,
        uniform="" if config.model_type in family.layer_class else family.uniform or UNDESCRIBED,
    )


def _depth(family: Family, config: PretrainedConfig, sizes: list[int]) -> Iterator[Space]:
    if family.layer is not None and meets(config, family.layer):
        key, count = family.layer.size, len(sizes)
        mean = round(sum(sizes) / count)
        yield Space(
            LAYER, MODEL, count, (), (), config=((key, 1),), pins=(), unit_params=mean, unit=LAYER, uniform=WHOLE
        )


def _sizes(layer_path: str, shapes: Shapes) -> list[int]:
    sizes: dict[int, int] = {}
    for name, shape in shapes.items():
        if name.startswith(f"{layer_path}."):
            index = int(name[len(layer_path) + 1 :].split(".")[0])
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
