"""Fills in one template for one layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from math import prod
from typing import NamedTuple

from transformers import PretrainedConfig

from ..errors import StructPruneError
from .families import Template
from .spec import CHANNEL, EXPERT, GROUP, Axis, Space


Shapes = Mapping[str, tuple[int, ...]]


class Heads(NamedTuple):
    """The attention heads of a config: how many there are, in how many KV groups, and the channels of each."""

    heads: int
    groups: int
    head_dim: int


class Dims(NamedTuple):
    """The dimensions of a projection's parameters: rows and columns of the weight, and rows of the bias."""

    rows: int
    columns: int
    bias_rows: int


# How weights are stored: (out, in) as in `nn.Linear`, (in, out) as in GPT-2, and both stacked over experts.
LINEAR, TRANSPOSED = Dims(0, 1, 0), Dims(1, 0, 0)
STACKED, STACKED_TRANSPOSED = Dims(1, 2, 1), Dims(2, 1, 1)
# The words of templates that stand for numbers of heads.
HEAD_WORDS = {"heads", "kv", "q", "q_gate"}


class Projections(NamedTuple):
    """The number of units of one template in one layer, the axes of the producers and of the consumers, and whether
    all consumers have a bias.
    """

    size: int
    out: list[Axis]
    into: list[Axis]
    biased: bool


def spaces_of(
    name: str, template: Template, layer: int, prefix: str, shapes: Shapes, config: PretrainedConfig
) -> Iterator[Space]:
    """The spaces that a template makes of one layer: none, one, or one per expert."""
    if not meets(config, template):
        return
    units = rows_per_unit(config, template)
    rows = {part for parts in template.out.values() for part in parts}
    base = Space(
        name=name,
        layer=layer,
        size=0,
        out=(),
        into=(),
        config=((template.size, 1), *((key, units["heads"]) for key in template.also)),
        pins=tuple((key, units["kv"]) for key in template.pin),
        unit_params=0,
        bias_flag=template.bias,
        scale=number(config, template.times) if template.times else 1,
        least=(getattr(config, template.least, None) if template.least else None) or 1,
        unit=CHANNEL if rows <= {"unit", "pair"} else GROUP,
        experts=f"{prefix}{template.experts}" if template.experts else None,
        uniform=template.uniform,
    )
    if template.router is not None:
        yield from _whole_experts(base, template, prefix, shapes)
    elif template.experts is not None:
        yield from _inside_experts(base, template, shapes, units)
    else:
        yield from _inside_layer(base, template, prefix, shapes, units)


def meets(config: PretrainedConfig, template: Template) -> bool:
    """Whether a config has the values that a template requires."""
    return all(getattr(config, key, None) in values for key, values in template.requires.items())


def heads_of(config: PretrainedConfig) -> Heads:
    """The attention heads of a config, with what transformers derives where the config does not say it."""
    heads = number(config, "num_attention_heads")
    groups = getattr(config, "num_key_value_heads", None) or heads
    return Heads(heads, groups, getattr(config, "head_dim", None) or number(config, "hidden_size") // heads)


def number(config: PretrainedConfig, key: str) -> int:
    """A whole number in a config."""
    value = getattr(config, key, None)
    if not isinstance(value, int) or value < 1:
        raise StructPruneError(
            f"The description of this family needs {key!r}, a number of 1 or more in the config of a "
            f"{config.model_type} model, and finds {value!r}."
        )
    return value


def rows_per_unit(config: PretrainedConfig, template: Template) -> dict[str, int]:
    """The rows of a weight that one unit owns, by those words for it that a template uses."""
    described = (*template.out.values(), *template.into.values(), *template.along.values())
    words = {part for parts in described for part in parts}
    words |= {"unit", *(["heads"] if template.also else []), *(["kv"] if template.pin else [])}
    # A config of a model without attention need not have any heads.
    heads, groups, head_dim = heads_of(config) if words & HEAD_WORDS else Heads(1, 1, 1)
    per_group = heads // groups
    units = {"unit": 1, "pair": 2, "heads": per_group, "kv": head_dim, "q": head_dim * per_group}
    units["q_gate"] = 2 * units["q"]
    return {
        word: units[word] if word in units else sum(number(config, key) for key in word.split("+")) for word in words
    }


def _inside_layer(
    base: Space, template: Template, prefix: str, shapes: Shapes, units: Mapping[str, int]
) -> Iterator[Space]:
    names = f"{prefix}{{}}.weight", f"{prefix}{{}}.bias"
    projections = _projections(template, names, TRANSPOSED if template.transposed else LINEAR, shapes, units)
    if projections is None:
        return
    out = list(projections.out)
    for param, parts in template.along.items():
        if f"{prefix}{param}" in shapes:
            out += _axes(f"{prefix}{param}", 0, parts, projections.size, shapes, units)
    yield _with_axes(replace(base, size=projections.size, biased=projections.biased), out, projections.into, shapes)


def _whole_experts(base: Space, template: Template, prefix: str, shapes: Shapes) -> Iterator[Space]:
    """One unit per expert: index 0 of every tensor of the router and of the experts, index 1 of a single row."""
    router = f"{prefix}{template.router}"
    if f"{router}.weight" not in shapes:
        return
    size = shapes[f"{router}.weight"][0]
    names = [name for owner in (router, base.experts) for name in shapes if name.startswith(f"{owner}.")]
    names += [f"{prefix}{param}" for param in template.along if f"{prefix}{param}" in shapes]
    dims = {name: int(len(shapes[name]) > 1 and shapes[name][0] == 1 < size) for name in names}
    out = [axis for name in names for axis in _axes(name, dims[name], ["unit"], size, shapes, {"unit": 1})]
    yield _with_axes(replace(base, size=size, unit=EXPERT), out, [], shapes)


def _inside_experts(base: Space, template: Template, shapes: Shapes, units: Mapping[str, int]) -> Iterator[Space]:
    """One space per expert, in parameters that stack the experts' matrices."""
    names = f"{base.experts}.{{}}", f"{base.experts}.{{}}_bias"
    dims = STACKED_TRANSPOSED if template.transposed else STACKED
    projections = _projections(template, names, dims, shapes, units)
    if projections is None:
        return
    for expert in range(shapes[projections.out[0].param][0]):
        space = replace(base, name=f"{base.name}/{expert}", size=projections.size, biased=projections.biased)
        out, into = ([replace(axis, part=expert) for axis in axes] for axes in (projections.out, projections.into))
        yield _with_axes(space, out, into, shapes)


def _projections(
    template: Template, names: tuple[str, str], dims: Dims, shapes: Shapes, units: Mapping[str, int]
) -> Projections | None:
    """The producers and consumers of a template; None where the first producer is not there."""
    weight, bias = (name.format for name in names)
    first, parts = next(iter(template.out.items()))
    if weight(first) not in shapes:
        return None
    size = shapes[weight(first)][dims.rows] // sum(units[part] for part in parts)
    out, into = [], []
    for name, parts in template.out.items():
        out += _axes(weight(name), dims.rows, parts, size, shapes, units)
        if bias(name) in shapes:
            out += _axes(bias(name), dims.bias_rows, parts, size, shapes, units)
    for name, parts in template.into.items():
        into += _axes(weight(name), dims.columns, parts, size, shapes, units)
    return Projections(size, out, into, all(bias(name) in shapes for name in template.into))


def _with_axes(space: Space, out: list[Axis], into: list[Axis], shapes: Shapes) -> Space:
    unit_params = 0
    for axis in out + into:
        shape = shapes[axis.param]
        unit_params += prod(shape if axis.part is None else shape[1:]) // shape[axis.dim] * axis.per_unit
    return replace(space, out=tuple(out), into=tuple(into), unit_params=unit_params)


def _axes(param: str, dim: int, parts: list[str], size: int, shapes: Shapes, units: Mapping[str, int]) -> list[Axis]:
    if param not in shapes:
        raise StructPruneError(f"{param} is missing; the description of this family expects it.")
    rows = [units[part] for part in parts]
    if shapes[param][dim] != size * sum(rows):
        raise StructPruneError(
            f"{param}: dimension {dim} is {shapes[param][dim]}, but {size} units of {sum(rows)} make "
            f"{size * sum(rows)}. The description of this family does not fit this model."
        )
    offsets = [size * sum(rows[:i]) for i in range(len(rows))]
    return [Axis(param, dim, per_unit, offset) for per_unit, offset in zip(rows, offsets, strict=True)]
