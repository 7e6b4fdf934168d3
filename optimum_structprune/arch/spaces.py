"""Fills in the templates of a family: the spaces of one layer, and the residual stream of a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import NamedTuple

from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from ..errors import StructPruneError
from .family import ResidualTemplate, Template
from .modules import embedding_of
from .spec import CHANNEL, EXPERT, GROUP, HIDDEN, MODEL, ONE_PER_MODEL, TOKEN, VOCAB, Axis, Read, ResidualStream, Space
from .token_space import VOCAB_SIZE, VOCAB_SIZE_PER_LAYER


TensorShapes = Mapping[str, tuple[int, ...]]


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


def spaces_of(
    name: str, template: Template, layer: int, prefix: str, shapes: TensorShapes, config: PretrainedConfig
) -> Iterator[Space]:
    """The spaces that a template makes of one layer: none, one, or one per expert."""
    if not meets(config, template):
        return
    units = rows_per_unit(config, template)
    rows = {part for parts in template.producers.values() for part in parts}
    base = Space(
        name=name,
        layer=layer,
        size=0,
        producers=(),
        consumers=(),
        config=((template.size, 1), *((key, units["heads"]) for key in template.also)),
        pins=tuple((key, units["kv"]) for key in template.pin),
        unit_params=0,
        scale=number(config, template.times) if template.times else 1,
        min_size=(getattr(config, template.min_size, None) if template.min_size else None) or 1,
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
    """Tells if a config has the values that a template requires."""
    return all(getattr(config, key, None) in values for key, values in template.requires.items())


def heads_of(config: PretrainedConfig) -> Heads:
    """The attention heads of a config; fields that it lacks are derived as transformers does."""
    heads = number(config, "num_attention_heads")
    groups = getattr(config, "num_key_value_heads", None) or heads
    if groups > heads:
        raise StructPruneError(f"num_key_value_heads={groups} is more than num_attention_heads={heads}.")
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
    """The rows of a weight that a unit owns, by the words of the template."""
    described = (*template.producers.values(), *template.consumers.values(), *template.also_cut.values())
    words = {part for parts in described for part in parts}
    words |= {"unit", *(["heads"] if template.also else []), *(["kv"] if template.pin else [])}
    # A config of a model without attention need not have any heads.
    heads, groups, head_dim = heads_of(config) if words & HEAD_WORDS else Heads(1, 1, 1)
    per_group = heads // groups
    units = {"unit": 1, "pair": 2, "heads": per_group, "kv": head_dim, "q": head_dim * per_group}
    units["q_gate"] = 2 * units["q"]
    return {word: units.get(word) or sum(number(config, key) for key in word.split("+")) for word in words}


def _inside_layer(
    base: Space, template: Template, prefix: str, shapes: TensorShapes, units: Mapping[str, int]
) -> Iterator[Space]:
    names = f"{prefix}{{}}.weight", f"{prefix}{{}}.bias"
    space = _with_projections(base, template, names, TRANSPOSED if template.transposed else LINEAR, shapes, units)
    if space is None:
        return
    producers = list(space.producers)
    for param, parts in template.also_cut.items():
        if f"{prefix}{param}" in shapes:
            producers += _axes(f"{prefix}{param}", 0, parts, space.size, shapes, units)
    yield _counted(replace(space, producers=tuple(producers)), shapes)


def _whole_experts(base: Space, template: Template, prefix: str, shapes: TensorShapes) -> Iterator[Space]:
    """One unit per expert: index 0 of every tensor of the router and of the experts, index 1 of a single row."""
    router = f"{prefix}{template.router}"
    if f"{router}.weight" not in shapes:
        return
    size = shapes[f"{router}.weight"][0]
    names = [name for owner in (router, base.experts) for name in shapes if name.startswith(f"{owner}.")]
    names += [f"{prefix}{param}" for param in template.also_cut if f"{prefix}{param}" in shapes]
    dims = {name: int(len(shapes[name]) > 1 and shapes[name][0] == 1 < size) for name in names}
    axes = (axis for name in names for axis in _axes(name, dims[name], ["unit"], size, shapes, {"unit": 1}))
    yield _counted(replace(base, size=size, unit=EXPERT, producers=tuple(axes)), shapes)


def _inside_experts(base: Space, template: Template, shapes: TensorShapes, units: dict[str, int]) -> Iterator[Space]:
    """One space per expert, in parameters that stack the experts' matrices."""
    names = f"{base.experts}.{{}}", f"{base.experts}.{{}}_bias"
    dims = STACKED_TRANSPOSED if template.transposed else STACKED
    space = _with_projections(base, template, names, dims, shapes, units)
    if space is None:
        return
    for expert in range(shapes[space.producers[0].param][0]):
        producers, consumers = (
            tuple(replace(axis, part=expert) for axis in axes) for axes in (space.producers, space.consumers)
        )
        yield _counted(replace(space, name=f"{base.name}/{expert}", producers=producers, consumers=consumers), shapes)


def _with_projections(
    base: Space, template: Template, names: tuple[str, str], dims: Dims, shapes: TensorShapes, units: Mapping[str, int]
) -> Space | None:
    """A space with its size and axes; None where the first producer is not there."""
    weight, bias = (name.format for name in names)
    first, parts = next(iter(template.producers.items()))
    if weight(first) not in shapes:
        return None
    size = shapes[weight(first)][dims.rows] // sum(units[part] for part in parts)
    producers, consumers = list[Axis](), list[Axis]()
    for name, parts in template.producers.items():
        producers += _axes(weight(name), dims.rows, parts, size, shapes, units)
        if bias(name) in shapes:
            producers += _axes(bias(name), dims.bias_rows, parts, size, shapes, units)
    for name, parts in template.consumers.items():
        consumers += _axes(weight(name), dims.columns, parts, size, shapes, units)
    return replace(base, size=size, producers=tuple(producers), consumers=tuple(consumers))


def _counted(space: Space, shapes: TensorShapes) -> Space:
    """A space with the number of parameters that go with each unit; one without units is refused."""
    if not space.size:
        name = space.producers[0].param
        raise StructPruneError(f"Layer {space.layer} has no {space.name}: {name} is {shapes[name]}.")
    unit_params = 0
    for axis in space.axes:
        shape = shapes[axis.param]
        unit_params += prod(shape if axis.part is None else shape[1:]) // shape[axis.dim] * axis.per_unit
    return replace(space, unit_params=unit_params)


def _axes(
    param: str, dim: int, parts: list[str], size: int, shapes: TensorShapes, units: Mapping[str, int]
) -> list[Axis]:
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


def residual_of(
    template: ResidualTemplate, shapes: TensorShapes, config: PretrainedConfig, prefix: str, layers: Sequence[str]
) -> ResidualStream:
    """The residual stream of a model."""
    size = number(config, template.size)
    embed, final = (f"{prefix}{module}.weight" for module in (template.embed, template.final))
    names = [f"{layer}{name}.weight" for layer in layers for name in template.norms]
    norms = [name for name in names if name in shapes]
    reads = [read for index, layer in enumerate(layers) for read in _reads(template, index, layer, shapes)]
    modules = [layer + module for layer in layers for module in template.producers]
    writers = [axis for module in modules for axis in _writers(module, template, shapes)]
    producers = [Axis(embed, 1), *writers, *(Axis(name, 0) for name in [*norms, final])]
    consumers = [axis for read in reads for axis in read.readers]
    if f"{template.head}.weight" in shapes:
        consumers.append(Axis(f"{template.head}.weight", 1))
    for axis in (*producers, *consumers):
        if axis.param not in shapes or shapes[axis.param][axis.dim] != size:
            found = f"has shape {shapes[axis.param]}" if axis.param in shapes else "is missing"
            raise StructPruneError(
                f"{axis.param} {found}; the description of {config.model_type!r} says that its dimension {axis.dim} "
                f"is the {size} channels of {template.size}."
            )
    inside = [axis for axis in (*producers, *consumers) if axis.param.startswith(tuple(layers))]
    space = Space(
        HIDDEN,
        MODEL,
        size,
        tuple(producers),
        tuple(consumers),
        config=((template.size, 1),),
        pins=tuple((key, heads_of(config).head_dim) for key in template.pin),
        # Only the parameters inside the layers count, because `sparsity` is a share of those.
        unit_params=sum(prod(shapes[axis.param]) // size for axis in inside),
        uniform=ONE_PER_MODEL,
    )
    reads.append(Read(MODEL, final.removesuffix(".weight"), (), norm=True))
    written = tuple(axis.param for axis in writers)
    return ResidualStream(space, embed, written, tuple(reads), template.norm_offset, template.scaled_embedding)


def _reads(template: ResidualTemplate, layer: int, prefix: str, shapes: TensorShapes) -> Iterator[Read]:
    for tap, modules in template.consumers.items():
        axes = [axis for module in modules for axis in _matrix(prefix + module, -1, template, shapes)]
        if axes:
            yield Read(layer, prefix + tap, tuple(axes), norm=tap in template.norms)


def _writers(module: str, template: ResidualTemplate, shapes: TensorShapes) -> Iterator[Axis]:
    yield from _matrix(module, -2, template, shapes)
    for bias, dim in ((f"{module}.bias", 0), (f"{module}_bias", 1)):
        if bias in shapes:
            yield Axis(bias, dim)


def _matrix(module: str, dim: int, template: ResidualTemplate, shapes: TensorShapes) -> Iterator[Axis]:
    """The axis of a module's weight, or of a parameter that stacks the experts' matrices, if there is one."""
    if f"{module}.weight" in shapes:
        yield Axis(f"{module}.weight", 2 + dim)
    elif module in shapes:
        yield Axis(module, (-dim if template.transposed else 3 + dim))


def vocabulary_of(model: PreTrainedModel, config: PretrainedConfig) -> Space | None:
    """The vocabulary of a model with this text config; None if no rows belong to tokens."""
    size, embedding, head = getattr(config, VOCAB_SIZE, None), embedding_of(model), model.get_output_embeddings()
    weight = getattr(embedding, "weight", None)
    if head is None:  # BLIP does not name its own
        linears = (module for module in model.modules() if isinstance(module, nn.Linear))
        head = next((linear for linear in linears if linear.weight is weight), None)
    tensors = model.state_dict(keep_vars=True)
    rows = {id(weight) for part in (embedding, head) if isinstance(weight := getattr(part, "weight", None), Tensor)}
    axes = [Axis(name, 0) for name, tensor in tensors.items() if id(tensor) in rows]
    if size is None or not axes or any(tensors[axis.param].shape[0] != size for axis in axes):
        return None
    if head is not None:  # biases of the logits, one number per token, in the head or beside it
        path = next(name for name, module in model.named_modules() if module is head)
        for name, tensor in tensors.items():
            is_beside = name.rpartition(".")[0] in (path, path.rpartition(".")[0])
            if is_beside and tensor.shape[-1] == tensor.numel() == size:
                axes.append(Axis(name, tensor.ndim - 1))
    per_layer = getattr(config, VOCAB_SIZE_PER_LAYER, None)
    axes += [
        Axis(f"{name}.weight", 0)
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and module.num_embeddings == per_layer and id(module.weight) not in rows
    ]
    owned = {
        id(tensor): tensor.numel() // size for axis in axes if isinstance(tensor := tensors[axis.param], nn.Parameter)
    }
    keys = ((VOCAB_SIZE, 1),)
    return Space(VOCAB, MODEL, size, tuple(axes), (), keys, (), sum(owned.values()), unit=TOKEN, uniform=ONE_PER_MODEL)
