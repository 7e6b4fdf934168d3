"""The vocabulary of removable dimensions, as frozen values: integers and strings only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property


MODEL = -1  # stands for a layer's index where a space belongs to the whole model
LAYER = "layer"  # the space whose units are whole layers
HIDDEN = "hidden"  # the space whose units are channels of the residual stream
EXPERT = "expert"  # the space whose units are whole experts
CHANNEL, GROUP = "channel", "group"  # units inside a layer: single channels, and KV heads with their query heads
WHOLE = "it belongs to the whole model"
# Widths by kind of space: one number for all layers, or one per layer, where layers that are not named stay whole.
Widths = Mapping[str, "int | Mapping[int, int]"]


@dataclass(frozen=True)
class Axis:
    """Where a space appears in one parameter.

    Unit `i` owns the indices `[offset + i * per_unit, offset + (i + 1) * per_unit)` of dimension `dim` of `param`.

    Attributes:
        param: Full name of the parameter in the model's state dict.
        dim: The dimension, counted from the front.
        per_unit: Indices per unit (1 for a channel, the head dimension for a KV head).
        offset: First index of unit 0 (non-zero in packed weights).
        part: Only this index of dimension 0: one expert of a parameter that stacks the experts' matrices.
    """

    param: str
    dim: int
    per_unit: int = 1
    offset: int = 0
    part: int | None = None

    def indices(self, keep: Sequence[int]) -> list[int]:
        """Indices of `dim` that the units in `keep` own, in order."""
        return [self.offset + unit * self.per_unit + i for unit in keep for i in range(self.per_unit)]

    @property
    def module(self) -> str:
        """Full name of the module that holds the parameter."""
        return self.param.rpartition(".")[0]


@dataclass(frozen=True)
class Space:
    """One removable dimension of one layer, or of the whole model.

    Attributes:
        name: Kind of space, such as `mlp` or `attention`; where a layer has several of a kind that share their width
            and choose their own units, such as the experts' channels, a slash and a label follow.
        layer: Index of the layer; `MODEL` where the space belongs to all of them.
        size: Number of units.
        out: Axes of the producers (rows).
        into: Axes of the consumers (columns); their inputs are observed and their weights refitted.
        config: Pairs of a config key and its value per unit.
        pins: Config keys and values that must be written out, because they would otherwise be derived.
        unit_params: Parameters that go with one unit, over all axes.
        bias_flag: Config key that gives the consumers of this space a bias, where the architecture has one.
        biased: Whether the consumers have a bias.
        scale: Units per unit of the width in the config.
        least: Smallest width that the config allows.
        experts: Full name of the module that holds the experts, where its routed input is what is observed.
        unit: What one unit is: `CHANNEL`, `GROUP`, `EXPERT` or `LAYER`.
        uniform: Why all layers have to keep the same width; empty where they need not.
    """

    name: str
    layer: int
    size: int
    out: tuple[Axis, ...]
    into: tuple[Axis, ...]
    config: tuple[tuple[str, int], ...]
    pins: tuple[tuple[str, int], ...]
    unit_params: int
    bias_flag: str | None = None
    biased: bool = False
    scale: int = 1
    least: int = 1
    experts: str | None = None
    unit: str = CHANNEL
    uniform: str = ""

    @property
    def kind(self) -> str:
        """The name without a label."""
        return self.name.partition("/")[0]

    @property
    def rounds(self) -> bool:
        """Whether widths are rounded to multiples that suit the hardware: those of channels are."""
        return self.unit == CHANNEL

    @property
    def inside(self) -> bool:
        """Whether the units lie inside a layer and leave it one: they are neither layers nor whole experts."""
        return self.unit in (CHANNEL, GROUP)

    @property
    def axes(self) -> tuple[Axis, ...]:
        """All axes, producers first."""
        return self.out + self.into

    @property
    def width(self) -> int:
        """The width in the config."""
        return self.size // self.scale

    def width_in(self, widths: Widths) -> int:
        """The width that `widths` gives to this space; its own where they are silent."""
        given = widths.get(self.kind, self.width)
        return given if isinstance(given, int) else given.get(self.layer, self.width)


@dataclass(frozen=True)
class Read:
    """A place where the residual stream is read.

    Attributes:
        layer: Index of the layer; `MODEL` for the head.
        tap: Full name of the module whose input is the stream itself: a norm, or where there is none, a reader.
        readers: Consumers of what comes from there.
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
        space: Its channels; `out` holds the embedding, the writers and the norms.
        embed: Full name of the embedding's weight.
        writers: Full names of all that is written with, weights and biases.
        reads: Where it is read, in the order of the forward pass; the last one is the head's.
        plus: What transformers adds to the weights of norms.
        scaled: Whether transformers multiplies embeddings by the root of the number of channels.
    """

    space: Space
    embed: str
    writers: tuple[str, ...]
    reads: tuple[Read, ...]
    plus: float
    scaled: bool


@dataclass(frozen=True)
class ArchSpec:
    """What may shrink in a model, and what shrinks with it.

    Attributes:
        model_type: The Hugging Face model type.
        layer_path: Dotted path of the list of layers; the first one where there are several.
        layer_params: Number of parameters of each layer.
        spaces: Every space of every layer, in the order in which a layer is pruned.
        missing: Why a space that users ask for is not offered, by name.
        stacks: Paths of the lists of layers and how many each holds, where layers count through several.
        causal: Whether the model predicts the next token, and perplexity measures it.
        wide: The spaces of the whole model, which go before those of the layers.
        stream: The residual stream, where its channels are one of these spaces.
        uniform: Why all layers have to keep the same width; empty where they need not.
    """

    model_type: str
    layer_path: str
    layer_params: tuple[int, ...]
    spaces: tuple[Space, ...]
    missing: tuple[tuple[str, str], ...] = ()
    stacks: tuple[tuple[str, int], ...] = ()
    causal: bool = True
    model_spaces: tuple[Space, ...] = ()
    stream: ResidualStream | None = None
    uniform: str = ""

    @property
    def num_layers(self) -> int:
        """Number of layers."""
        return len(self.layer_params)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Kinds of space that some layer has, in pruning order."""
        return tuple(dict.fromkeys(space.kind for space in self.spaces))

    @property
    def offered(self) -> tuple[str, ...]:
        """All kinds of space, those of the whole model first."""
        return (*(space.kind for space in self.model_spaces), *self.names)

    def at(self, layer: int) -> Iterator[Space]:
        """The spaces of layer `layer`."""
        return (space for space in self.spaces if space.layer == layer)

    def of(self, name: str) -> list[Space]:
        """The spaces of the kind `name`, in the order of the layers."""
        return [space for space in (*self.model_spaces, *self.spaces) if space.kind == name]

    def widths(self, name: str) -> dict[int, int]:
        """Present width of the spaces of the kind `name`, by layer."""
        return {space.layer: space.width for space in self.of(name)}

    def layer_prefix(self, layer: int) -> str:
        """Prefix of the state-dict names of layer `layer`, with the dot."""
        path, index = self.place(layer)
        return f"{path}.{index}."

    def place(self, layer: int) -> tuple[str, int]:
        """Path of the list that holds layer `layer`, and its index there."""
        for path, count in self.stacks:
            if layer < count:
                return path, layer
            layer -= count
        return self.layer_path, layer
