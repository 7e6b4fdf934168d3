"""Fills in the description of the residual stream for one model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import TYPE_CHECKING

from ..errors import StructPruneError
from .families import StreamTemplate, Template
from .spaces import Shapes, rows_per_unit
from .spec import HIDDEN, MODEL, WHOLE, Axis, Read, Space, Stream


if TYPE_CHECKING:
    from transformers import PretrainedConfig


def stream_of(
    template: StreamTemplate, shapes: Shapes, config: PretrainedConfig, prefix: str, blocks: Sequence[str]
) -> Stream:
    """The residual stream of a model.

    Args:
        template: Its description.
        shapes: Name and shape of every tensor in the state dict.
        config: The model's config.
        prefix: Path of the base model inside the model, with the dot.
        blocks: Full names of the blocks, each with the dot.

    Raises:
        StructPruneError: If a parameter is missing or is not as wide as the stream.
    """
    size = getattr(config, template.size)
    embed, final = (f"{prefix}{module}.weight" for module in (template.embed, template.final))
    norms = [f"{block}{name}.weight" for block in blocks for name in template.norms]
    reads = [read for layer, block in enumerate(blocks) for read in _reads(template, layer, block, shapes)]
    writers = [
        axis for block in blocks for module in template.out for axis in _writers(block + module, template, shapes)
    ]
    out = [Axis(embed, 1), *writers, *(Axis(name, 0) for name in [*norms, final])]
    into = [axis for read in reads for axis in read.readers]
    if f"{template.head}.weight" in shapes:
        into.append(Axis(f"{template.head}.weight", 1))
    for axis in (*out, *into):
        if axis.param not in shapes or shapes[axis.param][axis.dim] != size:
            found = (
                f"{axis.param} has shape {shapes[axis.param]}" if axis.param in shapes else f"{axis.param} is missing"
            )
            raise StructPruneError(
                f"{found}; the description of {config.model_type!r} says that its dimension {axis.dim} is the "
                f"{size} channels of {template.size}."
            )
    inside = [axis for axis in (*out, *into) if axis.param.startswith(tuple(blocks))]
    head_dim = rows_per_unit(config, Template(template.size))["kv"]
    space = Space(
        HIDDEN,
        MODEL,
        size,
        tuple(out),
        tuple(into),
        config=((template.size, 1),),
        pins=tuple((key, head_dim) for key in template.pin),
        # Those inside the blocks, of which `sparsity` is a share.
        unit_params=sum(prod(shapes[axis.param]) // size for axis in inside),
        uniform=WHOLE,
    )
    reads.append(Read(MODEL, final.removesuffix(".weight"), (), norm=True))
    names = tuple(axis.param for axis in writers)
    return Stream(space, embed, names, tuple(reads), template.plus, template.scaled)


def _reads(template: StreamTemplate, layer: int, block: str, shapes: Shapes) -> Iterator[Read]:
    for tap, modules in template.into.items():
        axes = [axis for module in modules for axis in _matrix(block + module, -1, template, shapes)]
        if axes:
            yield Read(layer, block + tap, tuple(axes), norm=tap in template.norms)


def _writers(module: str, template: StreamTemplate, shapes: Shapes) -> Iterator[Axis]:
    yield from _matrix(module, -2, template, shapes)
    for bias, dim in ((f"{module}.bias", 0), (f"{module}_bias", 1)):
        if bias in shapes:
            yield Axis(bias, dim)


def _matrix(module: str, dim: int, template: StreamTemplate, shapes: Shapes) -> Iterator[Axis]:
    """The weight of a module, or a parameter that stacks the matrices of all experts; none where there is neither."""
    if f"{module}.weight" in shapes:
        yield Axis(f"{module}.weight", 2 + dim)
    elif module in shapes:
        yield Axis(module, (-dim if template.transposed else 3 + dim))
