"""The vocabulary of removable dimensions, as frozen values: integers and strings only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property


# The layer index of a space that belongs to the whole model.
MODEL = -1

# The kinds of space whose units are whole layers, channels of the residual stream, tokens and whole experts.
LAYER = "layer"
HIDDEN = "hidden"
VOCAB = "vocab"
EXPERT = "expert"
# The kinds that are pruned before the units inside the layers, in this order.
WHOLE_MODEL = (VOCAB, LAYER, EXPERT, HIDDEN)

# The units inside a layer: single channels, and KV heads with their query heads.
CHANNEL = "channel"
GROUP = "group"
# The unit of the vocabulary.
TOKEN = "token"

ONE_PER_MODEL = "it belongs to the whole model"

# One width for all layers, or widths by layer. Layers that a mapping does not contain keep their full width.
Width = int | Mapping[int, int]
# Widths by the kind of space.
Widths = Mapping[str, Width]


def kind_of(name: str) -> str:
    """Return the kind of a space from its name, without the label after the slash."""
    return name.partition("/")[0]


@dataclass(frozen=True)
class Axis:
    """The place of a space in one parameter.

    Unit `i` owns the indices `[offset + i * per_unit, offset + (i + 1) * per_unit)` of dimension `dim`.

    Attributes:
        param: The full name of the parameter.
        dim: The dimension of the parameter.
        per_unit: The number of indices per unit.
        offset: The first index of unit 0.
        part: The index in dimension 0, if a parameter stacks the matrices of experts and the axis belongs to one
            expert.
    """

    param: str
    dim: int
    per_unit: int = 1
    offset: int = 0
    part: int | None = None

    def indices(self, keep: Sequence[int]) -> list[int]:
        """Return the indices of `dim` that the units in `keep` own, in the order of `keep`."""
        indices: list[int] = []
        for unit in keep:
            start = self.offset + unit * self.per_unit
            indices.extend(range(start, start + self.per_unit))

        return indices

    @property
    def module(self) -> str:
        """Return the full name of the module that holds the parameter."""
        return self.param.rpartition(".")[0]


@dataclass(frozen=True)
class Space:
    """One removable dimension of one layer, or of the whole model.

    Attributes:
        name: The kind of space, such as `mlp`. If a layer has several spaces of a kind, such as one for each expert, a
            slash and a label follow.
        layer: The index of the layer, or `MODEL`.
        size: The number of units.
        producers: The axes of the weights that compute the units (rows).
        consumers: The axes of the weights that read the units (columns). Pruning observes the inputs of these weights
            and refits them.
        config: Pairs of a config key and its value per unit.
        pins: Pairs of a config key and its value. Without these keys, the config class would derive a wrong value from
            the new width.
        unit_params: The number of parameters of one unit, over all axes.
        scale: The number of units per unit of the width in the config. It is more than 1 for experts that share a
            module.
        min_size: The smallest width that the config allows.
        experts: The full name of the module of experts. Pruning observes the routed input there.
        unit: The kind of unit: `CHANNEL`, `GROUP`, `EXPERT`, `LAYER` or `TOKEN`.
        uniform: The reason why all layers must have the same width, or empty if widths may differ.
        required: The units that are always kept.
    """

    name: str
    layer: int
    size: int
    producers: tuple[Axis, ...]
    consumers: tuple[Axis, ...]
    config: tuple[tuple[str, int], ...]
    pins: tuple[tuple[str, int], ...]
    unit_params: int
    scale: int = 1
    min_size: int = 1
    experts: str | None = None
    unit: str = CHANNEL
    uniform: str = ""
    required: tuple[int, ...] = ()

    @property
    def kind(self) -> str:
        """Return the name without the label."""
        return kind_of(self.name)

    @property
    def key(self) -> tuple[int, str]:
        """Return the layer and the name, the key of the space in plans and scores."""
        return self.layer, self.name

    @property
    def inside(self) -> bool:
        """Return whether the units lie inside a layer or an expert. Whole layers and whole experts do not."""
        return self.unit in (CHANNEL, GROUP)

    @property
    def axes(self) -> tuple[Axis, ...]:
        """Return all axes, producers first."""
        return self.producers + self.consumers

    @property
    def width(self) -> int:
        """Return the width in the config."""
        return self.size // self.scale

    def width_in(self, widths: Widths) -> int:
        """Return the width of this space in `widths`, by default its current width."""
        width = widths.get(self.kind, self.width)
        if isinstance(width, int):
            return width

        return width.get(self.layer, self.width)


@dataclass(frozen=True)
class Read:
    """A place in the model that reads the residual stream.

    Attributes:
        layer: The index of the layer, or `MODEL` for the head.
        tap: The full name of the module whose input is the residual stream: a norm, or else one of the readers.
        readers: The axes of the weights that read the output of the norm, or the residual stream itself.
        norm: Whether the tap is a norm.
    """

    layer: int
    tap: str
    readers: tuple[Axis, ...]
    norm: bool


@dataclass(frozen=True)
class ResidualStream:
    """The residual stream of a model whose norms divide by the root of the mean square.

    Attributes:
        space: The channels. The producers of the space contain the embedding, the writers and the norms.
        embed: The full name of the embedding's weight.
        writers: The full names of all weights and biases that write to the residual stream.
        reads: The places that read the residual stream, in the order of the forward pass, with the head last.
        norm_offset: The number that transformers adds to the weights of norms.
        scaled_embedding: Whether transformers multiplies embeddings by the root of the number of channels.
    """

    space: Space
    embed: str
    writers: tuple[str, ...]
    reads: tuple[Read, ...]
    norm_offset: float
    scaled_embedding: bool


@dataclass(frozen=True)
class ArchSpec:
    """The removable dimensions of a model, and all parameters that depend on them.

    Attributes:
        model_type: The model type.
        stacks: The path and the length of each list of layers. Layer indices count through all lists.
        layer_params: The number of parameters of each layer.
        spaces: Every space of every layer, in the order of pruning.
        missing: Pairs of a space that the model does not offer and the reason.
        causal: Whether the model predicts the next token, so that perplexity measures it.
        model_spaces: The spaces of the whole model. They are pruned before the spaces of the layers.
        residual: The residual stream, if its channels are one of the spaces.
        uniform: The reason why all layers must have the same width, or empty if widths may differ.
    """

    model_type: str
    stacks: tuple[tuple[str, int], ...]
    layer_params: tuple[int, ...]
    spaces: tuple[Space, ...]
    missing: tuple[tuple[str, str], ...] = ()
    causal: bool = True
    model_spaces: tuple[Space, ...] = ()
    residual: ResidualStream | None = None
    uniform: str = ""

    @property
    def layer_path(self) -> str:
        """Return the dotted path of the first list of layers."""
        return self.stacks[0][0]

    @property
    def num_layers(self) -> int:
        """Return the number of layers."""
        return len(self.layer_params)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Return the kinds of space inside the layers, in the order of pruning."""
        return tuple(dict.fromkeys(space.kind for space in self.spaces))

    @property
    def channels(self) -> tuple[str, ...]:
        """Return the kinds of space whose units are channels inside the layers, in the order of pruning."""
        return tuple(dict.fromkeys(space.kind for space in self.spaces if space.unit == CHANNEL))

    @property
    def offered(self) -> tuple[str, ...]:
        """Return all kinds of space, the kinds of the whole model first."""
        return tuple(space.kind for space in self.model_spaces) + self.names

    def at(self, layer: int) -> Iterator[Space]:
        """Yield the spaces of layer `layer`."""
        return (space for space in self.spaces if space.layer == layer)

    def of(self, name: str) -> list[Space]:
        """Return the spaces of the kind `name`, in the order of the layers."""
        return [space for space in self.model_spaces + self.spaces if space.kind == name]

    def by_layer(self, name: str) -> dict[int, list[Space]]:
        """Return the spaces of the kind `name`, by layer."""
        by_layer: dict[int, list[Space]] = {}
        for space in self.of(name):
            by_layer.setdefault(space.layer, []).append(space)

        return by_layer

    def widths(self, name: str) -> dict[int, int]:
        """Return the current width of the spaces of the kind `name`, by layer."""
        return {space.layer: space.width for space in self.of(name)}

    def layer_prefix(self, layer: int) -> str:
        """Return the prefix of the state-dict names of layer `layer`, with the dot."""
        for path, count in self.stacks:
            if layer < count:
                return f"{path}.{layer}."
            layer -= count

        raise IndexError(layer)
