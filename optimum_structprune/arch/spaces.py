"""Fill in the templates of a family to get the spaces of each layer and the residual stream of a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import NamedTuple

from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from ..system.errors import StructPruneError
from .family import ResidualTemplate, Template
from .modules import embedding_of
from .spec import CHANNEL, EXPERT, GROUP, HIDDEN, MODEL, ONE_PER_MODEL, TOKEN, VOCAB, Axis, Read, ResidualStream, Space
from .token_space import VOCAB_SIZE, VOCAB_SIZE_PER_LAYER


TensorShapes = Mapping[str, tuple[int, ...]]


class Heads(NamedTuple):
    """The attention heads of a config.

    Attributes:
        heads: The number of query heads.
        groups: The number of KV groups.
        head_dim: The number of channels of a head.
    """

    heads: int
    groups: int
    head_dim: int


class Dims(NamedTuple):
    """The dimensions of a projection's parameters.

    Attributes:
        rows: The dimension of the rows in the weight.
        columns: The dimension of the columns in the weight.
        bias_rows: The dimension of the rows in the bias.
    """

    rows: int
    columns: int
    bias_rows: int


# Weights are stored (out, in) as in `nn.Linear`, or (in, out) as in GPT-2. Both may be stacked over experts.
LINEAR = Dims(0, 1, 0)
TRANSPOSED = Dims(1, 0, 0)
STACKED = Dims(1, 2, 1)
STACKED_TRANSPOSED = Dims(2, 1, 1)
# The words of templates that depend on the attention heads.
HEAD_WORDS = {"heads", "kv", "q", "q_gate"}


def spaces_of(
    name: str, template: Template, layer: int, prefix: str, shapes: TensorShapes, config: PretrainedConfig
) -> Iterator[Space]:
    """Yield the spaces of one layer by a template: none, one, or one per expert.

    Args:
        name: The kind of space.
        template: The template of the family.
        layer: The index of the layer.
        prefix: The prefix of the layer's parameters, with the dot.
        shapes: The shapes of all parameters.
        config: The config of the layer.
    """
    if not meets(config, template):
        return

    units = rows_per_unit(config, template)
    base = _base_space(name, template, layer, prefix, config, units)
    if template.router is not None:
        yield from _whole_experts(base, template, prefix, shapes)
    elif template.experts is not None:
        yield from _inside_experts(base, template, shapes, units)
    else:
        yield from _inside_layer(base, template, prefix, shapes, units)


def _base_space(
    name: str, template: Template, layer: int, prefix: str, config: PretrainedConfig, units: Mapping[str, int]
) -> Space:
    """Return the space of one layer by a template, without its size and its axes."""
    config_keys = [(template.size, 1)]
    for key in template.also:
        config_keys.append((key, units["heads"]))

    producer_words: set[str] = set()
    for parts in template.producers.values():
        producer_words.update(parts)
    unit = GROUP
    if producer_words <= {"unit", "pair"}:
        unit = CHANNEL

    scale = 1
    if template.times:
        scale = number(config, template.times)

    min_size = 1
    if template.min_size is not None:
        min_size = getattr(config, template.min_size, None) or 1

    experts = None
    if template.experts:
        experts = f"{prefix}{template.experts}"

    return Space(
        name=name,
        layer=layer,
        size=0,
        producers=(),
        consumers=(),
        config=tuple(config_keys),
        pins=tuple((key, units["kv"]) for key in template.pin),
        unit_params=0,
        scale=scale,
        min_size=min_size,
        experts=experts,
        unit=unit,
        uniform=template.uniform,
    )


def meets(config: PretrainedConfig, template: Template) -> bool:
    """Return whether a config has the values that a template requires."""
    return all(getattr(config, key, None) in values for key, values in template.requires.items())


def heads_of(config: PretrainedConfig) -> Heads:
    """Return the attention heads of a config. Missing fields are derived as transformers does."""
    heads = number(config, "num_attention_heads")
    groups = getattr(config, "num_key_value_heads", None) or heads
    if groups > heads:
        raise StructPruneError(f"num_key_value_heads={groups} is more than num_attention_heads={heads}.")

    head_dim = getattr(config, "head_dim", None) or number(config, "hidden_size") // heads
    return Heads(heads, groups, head_dim)


def number(config: PretrainedConfig, key: str) -> int:
    """Return a field of a config. Raise if it is not a positive integer."""
    value = getattr(config, key, None)
    if not isinstance(value, int) or value < 1:
        raise StructPruneError(
            f"The description of this family needs {key!r}, a number of 1 or more in the config of a "
            f"{config.model_type} model, and finds {value!r}."
        )
    return value


def rows_per_unit(config: PretrainedConfig, template: Template) -> dict[str, int]:
    """Return the rows of a weight that belong to one unit, by the words of a template.

    `families/README.md` explains the words.
    """
    words = {"unit"}
    for weights in (template.producers, template.consumers, template.also_cut):
        for parts in weights.values():
            words.update(parts)
    if template.also:
        words.add("heads")
    if template.pin:
        words.add("kv")

    rows = {"unit": 1, "pair": 2}

    # The config of a model without attention need not have any heads.
    if not HEAD_WORDS.isdisjoint(words):
        heads, groups, head_dim = heads_of(config)
        heads_per_group = heads // groups
        rows["heads"] = heads_per_group
        rows["kv"] = head_dim
        rows["q"] = head_dim * heads_per_group
        rows["q_gate"] = 2 * rows["q"]

    # All other words are sums of config keys.
    for word in words:
        if word not in rows:
            rows[word] = sum(number(config, key) for key in word.split("+"))

    return {word: rows[word] for word in words}


def _inside_layer(
    base: Space, template: Template, prefix: str, shapes: TensorShapes, units: Mapping[str, int]
) -> Iterator[Space]:
    """Yield the space of one layer, if the layer has its first producer."""
    names = (f"{prefix}{{}}.weight", f"{prefix}{{}}.bias")
    dims = LINEAR
    if template.transposed:
        dims = TRANSPOSED

    space = _with_projections(base, template, names, dims, shapes, units)
    if space is None:
        return

    producers = list(space.producers)
    for param, parts in template.also_cut.items():
        if f"{prefix}{param}" in shapes:
            producers += _axes(f"{prefix}{param}", 0, parts, space.size, shapes, units)

    yield _counted(replace(space, producers=tuple(producers)), shapes)


def _whole_experts(base: Space, template: Template, prefix: str, shapes: TensorShapes) -> Iterator[Space]:
    """Yield the space whose units are the experts of one layer, if the layer has a router.

    An expert is index 0 of every tensor of the router and of the experts, or index 1 of a tensor with one row.
    """
    router = f"{prefix}{template.router}"
    if f"{router}.weight" not in shapes:
        return

    size = shapes[f"{router}.weight"][0]
    names: list[str] = []
    for module in (router, base.experts):
        names += [name for name in shapes if name.startswith(f"{module}.")]
    names += [f"{prefix}{param}" for param in template.also_cut if f"{prefix}{param}" in shapes]

    axes: list[Axis] = []
    for name in names:
        dim = 0
        shape = shapes[name]
        if len(shape) > 1 and shape[0] == 1 < size:
            dim = 1
        axes += _axes(name, dim, ["unit"], size, shapes, {"unit": 1})

    yield _counted(replace(base, size=size, unit=EXPERT, producers=tuple(axes)), shapes)


def _inside_experts(base: Space, template: Template, shapes: TensorShapes, units: dict[str, int]) -> Iterator[Space]:
    """Yield one space per expert, in parameters that stack the matrices of the experts."""
    names = (f"{base.experts}.{{}}", f"{base.experts}.{{}}_bias")
    dims = STACKED
    if template.transposed:
        dims = STACKED_TRANSPOSED

    space = _with_projections(base, template, names, dims, shapes, units)
    if space is None:
        return

    num_experts = shapes[space.producers[0].param][0]
    for expert in range(num_experts):
        producers = tuple(replace(axis, part=expert) for axis in space.producers)
        consumers = tuple(replace(axis, part=expert) for axis in space.consumers)
        expert_space = replace(space, name=f"{base.name}/{expert}", producers=producers, consumers=consumers)
        yield _counted(expert_space, shapes)


def _with_projections(
    base: Space, template: Template, names: tuple[str, str], dims: Dims, shapes: TensorShapes, units: Mapping[str, int]
) -> Space | None:
    """Return a space with its size and axes, or None if its first producer does not exist.

    `names` are the format strings of a projection's weight and bias.
    """
    weight_name, bias_name = names
    projection, projection_parts = next(iter(template.producers.items()))
    weight = weight_name.format(projection)
    if weight not in shapes:
        return None
    size = shapes[weight][dims.rows] // sum(units[part] for part in projection_parts)

    producers: list[Axis] = []
    for name, parts in template.producers.items():
        producers += _axes(weight_name.format(name), dims.rows, parts, size, shapes, units)
        if bias_name.format(name) in shapes:
            producers += _axes(bias_name.format(name), dims.bias_rows, parts, size, shapes, units)

    consumers: list[Axis] = []
    for name, parts in template.consumers.items():
        consumers += _axes(weight_name.format(name), dims.columns, parts, size, shapes, units)

    return replace(base, size=size, producers=tuple(producers), consumers=tuple(consumers))


def _counted(space: Space, shapes: TensorShapes) -> Space:
    """Return a space with the number of parameters per unit. Raise if it has no units."""
    if not space.size:
        name = space.producers[0].param
        raise StructPruneError(f"Layer {space.layer} has no {space.name}: {name} is {shapes[name]}.")

    unit_params = 0
    for axis in space.axes:
        shape = shapes[axis.param]
        num_entries = prod(shape)
        if axis.part is not None:
            num_entries = prod(shape[1:])
        unit_params += num_entries // shape[axis.dim] * axis.per_unit

    return replace(space, unit_params=unit_params)


def _axes(
    param: str, dim: int, parts: list[str], size: int, shapes: TensorShapes, units: Mapping[str, int]
) -> list[Axis]:
    """Return one axis for each part of a packed parameter. Raise if its shape does not fit the number of units."""
    if param not in shapes:
        raise StructPruneError(f"{param} is missing. The description of this family expects it.")

    rows = [units[part] for part in parts]
    if shapes[param][dim] != size * sum(rows):
        raise StructPruneError(
            f"{param}: dimension {dim} is {shapes[param][dim]}, but {size} units of {sum(rows)} make "
            f"{size * sum(rows)}. The description of this family does not fit this model."
        )

    axes = []
    offset = 0
    for per_unit in rows:
        axes.append(Axis(param, dim, per_unit, offset))
        offset += size * per_unit

    return axes


def residual_of(
    template: ResidualTemplate, shapes: TensorShapes, config: PretrainedConfig, prefix: str, layers: Sequence[str]
) -> ResidualStream:
    """Return the residual stream of a model.

    Args:
        template: The template of the family.
        shapes: The shapes of all parameters.
        config: The config of the model.
        prefix: The prefix of the base model's parameters, with the dot.
        layers: The prefixes of the layers' parameters, with the dots.

    Raises:
        StructPruneError: If a parameter is missing, or does not have as many channels as the residual stream.
    """
    size = number(config, template.size)
    embed = f"{prefix}{template.embed}.weight"
    final_norm = f"{prefix}{template.final}"

    writers: list[Axis] = []
    norms: list[Axis] = []
    reads: list[Read] = []
    for index, layer in enumerate(layers):
        for name in template.producers:
            writers.extend(_writers(layer + name, template, shapes))
        for name in template.norms:
            norm = f"{layer}{name}.weight"
            if norm in shapes:
                norms.append(Axis(norm, 0))
        reads.extend(_reads(template, index, layer, shapes))

    consumers: list[Axis] = []
    for place in reads:
        consumers.extend(place.readers)
    if f"{template.head}.weight" in shapes:
        consumers.append(Axis(f"{template.head}.weight", 1))

    producers = [Axis(embed, 1)] + writers + norms
    producers.append(Axis(f"{final_norm}.weight", 0))
    for axis in producers + consumers:
        _check_channels(axis, size, template, shapes, config)

    # Only parameters inside the layers count, because `sparsity` is a share of these.
    unit_params = 0
    for axis in producers + consumers:
        if axis.param.startswith(tuple(layers)):
            unit_params += prod(shapes[axis.param]) // size

    space = Space(
        name=HIDDEN,
        layer=MODEL,
        size=size,
        producers=tuple(producers),
        consumers=tuple(consumers),
        config=((template.size, 1),),
        pins=tuple((key, heads_of(config).head_dim) for key in template.pin),
        unit_params=unit_params,
        uniform=ONE_PER_MODEL,
    )
    reads.append(Read(MODEL, final_norm, (), norm=True))
    return ResidualStream(
        space=space,
        embed=embed,
        writers=tuple(axis.param for axis in writers),
        reads=tuple(reads),
        norm_offset=template.norm_offset,
        scaled_embedding=template.scaled_embedding,
    )


def _check_channels(
    axis: Axis, size: int, template: ResidualTemplate, shapes: TensorShapes, config: PretrainedConfig
) -> None:
    """Raise if a parameter does not have the channels of the residual stream."""
    shape = shapes.get(axis.param)
    if shape is not None and shape[axis.dim] == size:
        return

    problem = f"has shape {shape}"
    if shape is None:
        problem = "is missing"
    raise StructPruneError(
        f"{axis.param} {problem}. The description of {config.model_type!r} says that its dimension {axis.dim} is the "
        f"{size} channels of {template.size}."
    )


def _reads(template: ResidualTemplate, layer: int, prefix: str, shapes: TensorShapes) -> Iterator[Read]:
    """Yield the places where a layer reads the residual stream."""
    for tap, modules in template.consumers.items():
        readers: list[Axis] = []
        for module in modules:
            readers.extend(_matrix(prefix + module, -1, template, shapes))
        if readers:
            yield Read(layer, prefix + tap, tuple(readers), norm=tap in template.norms)


def _writers(module: str, template: ResidualTemplate, shapes: TensorShapes) -> Iterator[Axis]:
    """Yield the axes of a module's weight and bias that write to the residual stream."""
    yield from _matrix(module, -2, template, shapes)
    if f"{module}.bias" in shapes:
        yield Axis(f"{module}.bias", 0)
    if f"{module}_bias" in shapes:
        yield Axis(f"{module}_bias", 1)


def _matrix(module: str, dim: int, template: ResidualTemplate, shapes: TensorShapes) -> Iterator[Axis]:
    """Yield the axis of a module's weight, or of a parameter that stacks the matrices of experts, if it exists.

    `dim` is -2 for the rows and -1 for the columns.
    """
    if f"{module}.weight" in shapes:
        yield Axis(f"{module}.weight", 2 + dim)
    elif module in shapes and template.transposed:
        yield Axis(module, -dim)
    elif module in shapes:
        yield Axis(module, 3 + dim)


def vocabulary_of(model: PreTrainedModel, config: PretrainedConfig) -> Space | None:
    """Return the vocabulary of a model with this text config, or None if no rows belong to tokens."""
    size = getattr(config, VOCAB_SIZE, None)
    if size is None:
        return None

    embedding = embedding_of(model)
    head = _head_of(model, getattr(embedding, "weight", None))
    tensors = model.state_dict(keep_vars=True)

    # The state dict may contain a tied weight under two names.
    weights = [getattr(module, "weight", None) for module in (embedding, head)]
    weight_ids = {id(weight) for weight in weights if isinstance(weight, Tensor)}
    axes = [Axis(name, 0) for name, tensor in tensors.items() if id(tensor) in weight_ids]
    if not axes or any(tensors[axis.param].shape[0] != size for axis in axes):
        return None

    if head is not None:
        axes += _logit_biases(model, head, tensors, size)
    axes += _tables_per_layer(model, config, weight_ids)

    # Tied weights count once.
    unit_params: dict[int, int] = {}
    for axis in axes:
        tensor = tensors[axis.param]
        if isinstance(tensor, nn.Parameter):
            unit_params[id(tensor)] = tensor.numel() // size

    return Space(
        name=VOCAB,
        layer=MODEL,
        size=size,
        producers=tuple(axes),
        consumers=(),
        config=((VOCAB_SIZE, 1),),
        pins=(),
        unit_params=sum(unit_params.values()),
        unit=TOKEN,
        uniform=ONE_PER_MODEL,
    )


def _head_of(model: PreTrainedModel, embedding: Tensor | None) -> nn.Module | None:
    """Return the head that predicts tokens, or None.

    BLIP does not name its head, so a linear layer with the weight of the embedding counts as the head too.
    """
    head = model.get_output_embeddings()
    if head is not None:
        return head

    for module in model.modules():
        if isinstance(module, nn.Linear) and module.weight is embedding:
            return module
    return None


def _logit_biases(model: PreTrainedModel, head: nn.Module, tensors: Mapping[str, Tensor], size: int) -> Iterator[Axis]:
    """Yield the axes of logit biases, one number per token, in the head or in its parent module."""
    path = next(name for name, module in model.named_modules() if module is head)
    for name, tensor in tensors.items():
        owner = name.rpartition(".")[0]
        is_near = owner in (path, path.rpartition(".")[0])
        if is_near and tensor.shape[-1] == tensor.numel() == size:
            yield Axis(name, tensor.ndim - 1)


def _tables_per_layer(model: PreTrainedModel, config: PretrainedConfig, weight_ids: set[int]) -> Iterator[Axis]:
    """Yield the axes of further embeddings with a row for each token, which some models have for every layer.

    `weight_ids` are the ids of the weights of the embedding and the head.
    """
    size = getattr(config, VOCAB_SIZE_PER_LAYER, None)
    for name, module in model.named_modules():
        if not isinstance(module, nn.Embedding) or id(module.weight) in weight_ids:
            continue
        if module.num_embeddings == size:
            yield Axis(f"{name}.weight", 0)
