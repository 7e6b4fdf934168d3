"""Fills in the description of the residual stream for one model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod

from transformers import PretrainedConfig

from ..errors import StructPruneError
from .families import ResidualTemplate
from .spaces import Shapes, heads_of, number
from .spec import HIDDEN, MODEL, ONE_PER_MODEL, Axis, Read, ResidualStream, Space


def residual_of(
    template: ResidualTemplate, shapes: Shapes, config: PretrainedConfig, prefix: str, layers: Sequence[str]
) -> ResidualStream:
    """The residual stream of a model."""
    size = number(config, template.size)
    embed, final = (f"{prefix}{module}.weight" for module in (template.embed, template.final))
    names = [f"{layer}{name}.weight" for layer in layers for name in template.norms]
    norms = [name for name in names if name in shapes]
    reads = [read for index, layer in enumerate(layers) for read in _reads(template, index, layer, shapes)]
    writers = [
        axis for layer in layers for module in template.out for axis in _writers(layer + module, template, shapes)
    ]
    out = [Axis(embed, 1), *writers, *(Axis(name, 0) for name in [*norms, final])]
    into = [axis for read in reads for axis in read.readers]
    if f"{template.head}.weight" in shapes:
        into.append(Axis(f"{template.head}.weight", 1))
    for axis in (*out, *into):
        if axis.param not in shapes or shapes[axis.param][axis.dim] != size:
            problem = (
                f"{axis.param} has shape {shapes[axis.param]}" if axis.param in shapes else f"{axis.param} is missing"
            )
            raise StructPruneError(
                f"{problem}; the description of {config.model_type!r} says that its dimension {axis.dim} is the "
                f"{size} channels of {template.size}."
            )
    inside = [axis for axis in (*out, *into) if axis.param.startswith(tuple(layers))]
    space = Space(
        HIDDEN,
        MODEL,
        size,
        tuple(out),
        tuple(into),
        config=((template.size, 1),),
        pins=tuple((key, heads_of(config).head_dim) for key in template.pin),
        # Only the parameters inside the layers count, because `sparsity` is a share of those.
        unit_params=sum(prod(shapes[axis.param]) // size for axis in inside),
        uniform=ONE_PER_MODEL,
    )
    reads.append(Read(MODEL, final.removesuffix(".weight"), (), norm=True))
    written = tuple(axis.param for axis in writers)
    return ResidualStream(space, embed, written, tuple(reads), template.plus, template.scaled)


def _reads(template: ResidualTemplate, layer: int, prefix: str, shapes: Shapes) -> Iterator[Read]:
    for tap, modules in template.into.items():
        axes = [axis for module in modules for axis in _matrix(prefix + module, -1, template, shapes)]
        if axes:
            yield Read(layer, prefix + tap, tuple(axes), norm=tap in template.norms)


def _writers(module: str, template: ResidualTemplate, shapes: Shapes) -> Iterator[Axis]:
    yield from _matrix(module, -2, template, shapes)
    for bias, dim in ((f"{module}.bias", 0), (f"{module}_bias", 1)):
        if bias in shapes:
            yield Axis(bias, dim)


def _matrix(module: str, dim: int, template: ResidualTemplate, shapes: Shapes) -> Iterator[Axis]:
    """The axis of a module's weight, or of a parameter that stacks the matrices of all experts; nothing where there is
    neither.
    """
    if f"{module}.weight" in shapes:
        yield Axis(f"{module}.weight", 2 + dim)
    elif module in shapes:
        yield Axis(module, (-dim if template.transposed else 3 + dim))
