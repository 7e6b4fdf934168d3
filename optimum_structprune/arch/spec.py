"""The vocabulary of removable dimensions, as frozen values: integers and strings only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property


MODEL = -1  # stands for a layer's index where a space belongs to the whole model
LAYER = "layer"  # the space whose units are whole layers
HIDDEN = "hidden"  # the space whose units are channels of the residual stream
VOCAB = "vocab"  # the space whose units are tokens
EXPERT = "expert"  # the space whose units are whole experts
WHOLE_MODEL = (VOCAB, LAYER, EXPERT, HIDDEN)  # what goes before the units inside the layers, in this order
CHANNEL, GROUP = "channel", "group"  # units inside a layer: single channels, and KV heads with their query heads
TOKEN = "token"
ONE_PER_MODEL = "it belongs to the whole model"
# One number for all layers, or one per layer, where layers that are not named keep their full width.
Width = int | Mapping[int, int]
Widths = Mapping[str, Width]  # by kind of space


def kind_of(name: str) -> str:
    """The kind of a space by its name, which may have a label behind a slash."""
    return name.partition("/")[0]


@dataclass(frozen=True)
class Axis:
    """The place of a space in one parameter.

    Unit `i` owns the indices `[offset + i * per_unit, offset + (i + 1) * per_unit)` of dimension `dim` of `param`; of
    one that stacks the matrices of experts, only at index `part` of dimension 0.
    """

    param: str
    dim: int
    per_unit: int = 1
    offset: int = 0
    part: int | None = None

    def indices(self, keep: Sequence[int]) -> list[int]:
        """The indices of `dim` that the units in `keep` own, in order."""
        return [self.offset + unit * self.per_unit + i for unit in keep for i in range(self.per_unit)]

    @property
    def module(self) -> str:
        """The full name of the module that holds the parameter."""
        return self.param.rpartition(".")[0]


@dataclass(frozen=True)
class Space:
    """One removable dimension of one layer, or of the whole model."""

    name: str  # its kind, such as `mlp`; a slash and a label follow where a layer has several, as for experts
    layer: int  # the index of the layer; `MODEL` where the space belongs to all of them
    size: int  # the number of units
    producers: tuple[Axis, ...]  # the axes of the weights that write the units (rows)
    # The axes of the weights that read the units (columns); their inputs are observed, and they are refitted.
    consumers: tuple[Axis, ...]
    config: tuple[tuple[str, int], ...]  # pairs of a config key and its value per unit
    # Config keys and values that must be written out, because they would otherwise be derived.
    pins: tuple[tuple[str, int], ...]
    unit_params: int  # the number of parameters that go with one unit, over all axes
    scale: int = 1  # units per unit of the width in the config: more than 1 for several experts in one module
    min_size: int = 1  # the smallest width that the config allows
    experts: str | None = None  # the full name of the module of experts, where its routed input is observed
    unit: str = CHANNEL  # what one unit is: `CHANNEL`, `GROUP`, `EXPERT`, `LAYER` or `TOKEN`
    uniform: str = ""  # the reason why all layers have to keep the same width; empty where they need not

    @property
    def kind(self) -> str:
        """The name without a label."""
        return kind_of(self.name)

    @property
    def key(self) -> tuple[int, str]:
        """The layer and the name, by which plans and scores know the space."""
        return self.layer, self.name

    @property
    def inside(self) -> bool:
        """True if the units lie inside a layer or an expert; false for whole layers and whole experts."""
        return self.unit in (CHANNEL, GROUP)

    @property
    def axes(self) -> tuple[Axis, ...]:
        """All axes, producers first."""
        return self.producers + self.consumers

    @property
    def width(self) -> int:
        """The width in the config."""
        return self.size // self.scale

    def width_in(self, widths: Widths) -> int:
        """The width of this space in `widths`, by default the present one."""
        given = widths.get(self.kind, self.width)
        return given if isinstance(given, int) else given.get(self.layer, self.width)


@dataclass(frozen=True)
class Read:
    """A place where the residual stream is read: the layer, `MODEL` for the head, the module `tap` whose input is the
    residual stream itself, a norm or else one of the readers, and the consumers of what comes from there.
    """

    layer: int
    tap: str
    readers: tuple[Axis, ...]
    norm: bool


@dataclass(frozen=True)
class ResidualStream:
    """The residual stream of a model whose norms divide by the root of the mean square."""

    space: Space  # the channels; its `producers` hold the embedding, the writers and the norms
    embed: str  # the full name of the embedding's weight
    writers: tuple[str, ...]  # the full names of all weights and biases that write to the residual stream
    reads: tuple[Read, ...]  # the places where it is read, in the order of the forward pass, the head's last
    norm_offset: float  # the number that transformers adds to the weights of norms
    scaled_embedding: bool  # whether transformers multiplies embeddings by the root of the number of channels


@dataclass(frozen=True)
class ArchSpec:
    """The removable dimensions of a model, and all parameters that depend on them."""

    model_type: str
    stacks: tuple[tuple[str, int], ...]  # the paths and lengths of the lists of layers, through which layers count
    layer_params: tuple[int, ...]  # the number of parameters of each layer
    spaces: tuple[Space, ...]  # every space of every layer, in the order in which a layer is pruned
    missing: tuple[tuple[str, str], ...] = ()  # a space that users ask for, and why it is not offered
    causal: bool = True  # whether the model predicts the next token, and perplexity measures it
    model_spaces: tuple[Space, ...] = ()  # the spaces of the whole model, which are pruned before those of the layers
    residual: ResidualStream | None = None  # where its channels are one of these spaces
    uniform: str = ""  # the reason why all layers have to keep the same width; empty where they need not

    @property
    def layer_path(self) -> str:
        """The dotted path of the list of layers; of the first one where there are several."""
        return self.stacks[0][0]

    @property
    def num_layers(self) -> int:
        """The number of layers."""
        return len(self.layer_params)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The kinds of space that some layer has, in pruning order."""
        return tuple(dict.fromkeys(space.kind for space in self.spaces))

    @property
    def channels(self) -> tuple[str, ...]:
        """The kinds of space whose units are channels inside the layers, in pruning order."""
        return tuple(dict.fromkeys(space.kind for space in self.spaces if space.unit == CHANNEL))

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

    def by_layer(self, name: str) -> dict[int, list[Space]]:
        """The spaces of the kind `name`, by layer."""
        by_layer: dict[int, list[Space]] = {}
        for space in self.of(name):
            by_layer.setdefault(space.layer, []).append(space)
        return by_layer

    def widths(self, name: str) -> dict[int, int]:
        """The present width of the spaces of the kind `name`, by layer."""
        return {space.layer: space.width for space in self.of(name)}

    def layer_prefix(self, layer: int) -> str:
        """The prefix of the state-dict names of layer `layer`, with the dot."""
        for path, count in self.stacks:
            if layer < count:
                return f"{path}.{layer}."
            layer -= count
        raise IndexError(layer)
