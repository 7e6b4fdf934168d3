"""The numbers that the cost of a pruning follows from: shapes, samples and passes. No weight is read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import ceil

from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from ..arch.spec import GROUP, LAYER, ArchSpec, Axis, Space, Widths
from ..config.pruning import StructPruneConfig
from ..criteria import CRITERIA, saliencies_for
from ..domains.broad import texts_of
from ..domains.load import num_heldout
from ..pruning.gates import learns
from ..pruning.search import FINALISTS, TRIAL_TOKENS
from ..pruning.trials import PROBE_TOKENS


# The shapes that each way to search proposes: for each layer with whole layers gone and without, one halfway to one
# width, one shape for all layers with and without all of them, and the shape without measured losses.
FINALS = {"sensitivity": 3, "search": 6, "search_uniform": FINALISTS + 2}


@dataclass(frozen=True)
class Consumer:
    """A matrix whose columns are removed.

    Attributes:
        layer: The index of its layer.
        space: The name of its space.
        size: The number n of its columns.
        kept: The number of columns that are kept.
        out: The number of its rows.
        per_unit: The number of columns that a unit owns.
        share: The share of all tokens that it reads: below 1 for an expert.
        expert: Whether it is one of several experts in one parameter.
    """

    layer: int
    space: str
    size: int
    kept: int
    out: int
    per_unit: int
    share: float = 1.0
    expert: bool = False


@dataclass(frozen=True)
class Layer:
    """What one layer holds and computes.

    Attributes:
        parameters: The number of its parameters.
        left: How many of them are left after the pruning.
        products: The number of parameters that a token is multiplied by.
        attention: The number of channels of all query heads.
        wide: The number of channels of the widest activation of a token.
    """

    parameters: int
    left: int
    products: float
    attention: int
    wide: int


@dataclass(frozen=True)
class Samples:
    """How much text is run.

    Attributes:
        count: The number of calibration samples.
        heldout: The number of held-out samples, those included that choices are made on.
        length: The number of tokens of a sample.
        batch: The number of samples in a forward pass.
        domains: The number of domains.
    """

    count: int
    heldout: int
    length: int
    batch: int
    domains: int

    @classmethod
    def of(cls, config: StructPruneConfig, inputs: Mapping[str, Tensor] | None = None) -> Samples:
        """The samples that a config asks for, or those that are given in their place; without text where stored
        moments stand in for it.
        """
        if inputs is None:
            domains = 0 if config.stats is not None else len(texts_of(config))
            count = 0 if config.stats is not None else config.num_samples
            aside, length = domains * num_heldout(ceil(count / max(domains, 1)), config.holdout), config.seq_length
            aside *= 2 if config.chooses else 1
        else:
            domains, rows = len(inputs), sum(map(len, inputs.values()))
            aside = sum(num_heldout(len(samples), config.holdout) for samples in inputs.values())
            aside *= 2 if config.chooses else 1
            # What is no text has as many tokens as the model makes of it, which shapes do not say.
            length = max((samples.shape[1] if samples.ndim == 2 else 1 for samples in inputs.values()), default=0)
            count = max(rows - aside, 0)
        return cls(count, aside, length, min(config.samples_at_once, ceil(count / max(domains, 1))), domains)

    @property
    def tokens(self) -> int:
        """The number of calibration tokens."""
        return self.count * self.length

    @property
    def batch_tokens(self) -> int:
        """The number of tokens in a forward pass."""
        return self.batch * self.length


@dataclass(frozen=True)
class Choosing:
    """What is run before the first round to choose the widths of single layers, or the shape.

    Attributes:
        ranked: Whether all units are scored once on the dense model.
        judged: Whether the dense model runs once over the samples, to compare what enters and leaves each layer.
        probe: The number of held-out tokens that every trial runs; 0 without trials.
        probe_batches: The number of batches that they make.
        finals: How many shapes are pruned on trial, at most.
        samples: The number of calibration samples of each of these.
        without_layers: Whether each layer is left out in turn.
    """

    ranked: bool = False
    judged: bool = False
    probe: int = 0
    probe_batches: int = 0
    finals: int = 0
    samples: int = 0
    without_layers: bool = False

    @classmethod
    def of(cls, config: StructPruneConfig, arch: ArchSpec, samples: Samples) -> Choosing:
        """What a config asks for."""
        if not config.searches or not samples.domains:
            return cls(config.allocation == "global", config.allocation == "cosine")
        each = ceil(PROBE_TOKENS / max(samples.length, 1) / samples.domains)
        # Half of what is set aside is for the report.
        each = min(each, samples.heldout // 2 // samples.domains)
        most = max(1, TRIAL_TOKENS // samples.domains // max(samples.length, 1))
        return cls(
            probe=each * samples.domains * samples.length,
            probe_batches=samples.domains * ceil(each / max(samples.batch, 1)),
            finals=FINALS[config.allocation],
            samples=min(samples.count, most * samples.domains),
            without_layers=config.allocation != "sensitivity" and LAYER in arch.offered and config.widths is None,
        )


@dataclass(frozen=True)
class Workload:
    """What one pruning has to go through.

    Attributes:
        layers: The layers.
        consumers: The matrices that lose columns.
        samples: The text.
        outside: The number of parameters that belong to no layer: embeddings, last norm and head.
        hidden: The number of channels of the residual stream.
        vocab: The number of logits of a token; 0 where the model does not predict tokens.
        itemsize: The number of bytes of a weight.
        rounds: The number of rounds.
        feedback: Whether error feedback runs the dense residual stream beside the present one.
        gram: Whether Gram matrices are gathered.
        factors: Whether scores take a factor of the Gram matrix.
        apart: Whether each domain is scored by itself.
        fits: Whether kept weights are fitted.
        views: How many passes over the samples scores take through the whole model before each round.
        gradient: Whether these passes go backward too.
        learning: The number of tokens that gates are learned on, counted each time that they are run.
        choosing: What is run before to choose the widths.
    """

    layers: tuple[Layer, ...]
    consumers: tuple[Consumer, ...]
    samples: Samples
    outside: int
    hidden: int
    vocab: int
    itemsize: int
    rounds: int
    feedback: bool
    gram: bool
    factors: bool
    apart: bool
    fits: bool
    views: int
    gradient: bool
    learning: int = 0
    choosing: Choosing = Choosing()

    @property
    def weights(self) -> int:
        """The bytes of the dense model."""
        return self.itemsize * (self.outside + sum(layer.parameters for layer in self.layers))

    @property
    def result(self) -> int:
        """The bytes of the pruned model."""
        return self.itemsize * (self.outside + sum(layer.left for layer in self.layers))

    @property
    def streams(self) -> int:
        """The number of residual streams that are stored."""
        return 2 if self.feedback else 1

    def at(self, layer: int) -> Iterator[Consumer]:
        """The consumers of one layer."""
        return (consumer for consumer in self.consumers if consumer.layer == layer)


def workload(
    config: StructPruneConfig,
    arch: ArchSpec,
    model: PreTrainedModel,
    widths: Widths,
    itemsize: int,
    inputs: Mapping[str, Tensor] | None = None,
) -> Workload:
    """What a pruning has to go through."""
    text, samples = model.config.get_text_config(), Samples.of(config, inputs)
    criterion = CRITERIA.get(config.scored_by) if config.scored_by in CRITERIA.names() else None
    shapes = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    chosen = _active(text)
    consumers = tuple(
        _consumer(axis, space, shapes[axis.param], widths, chosen)
        for space in arch.spaces
        if space.inside and space.width_in(widths) < space.width
        for axis in space.into
    )
    layers = tuple(_layer(layer, arch, shapes, widths, chosen) for layer in range(arch.num_layers))
    return Workload(
        layers=layers,
        consumers=consumers,
        samples=samples,
        outside=model.num_parameters() - sum(arch.layer_params),
        hidden=getattr(text, "hidden_size", 0) or max((consumer.out for consumer in consumers), default=0),
        vocab=text.vocab_size if arch.causal else 0,
        itemsize=itemsize,
        rounds=config.rounds,
        feedback=config.fits and config.error_feedback > 0 and config.stats is None,
        gram=config.correlates or bool(criterion and criterion.needs_gram),
        factors=bool(criterion and criterion.damped),
        apart=False,
        fits=config.fits,
        views=criterion.views if criterion and saliencies_for(criterion) else 0,
        gradient=bool(criterion and criterion.needs_gradient),
        learning=_learning(config, samples) if learns(config) else 0,
        choosing=Choosing.of(config, arch, samples),
    )


def _learning(config: StructPruneConfig, samples: Samples) -> int:
    return config.gates.steps * config.gates.samples_per_step(max(samples.length, 1)) * samples.length


def _active(text: PreTrainedConfig) -> int:
    """The number of experts that a token goes to."""
    return next((n for key in ("num_experts_per_tok", "top_k") if isinstance(n := getattr(text, key, None), int)), 1)


def _consumer(axis: Axis, space: Space, shape: tuple[int, ...], widths: Widths, chosen: int) -> Consumer:
    matrix = shape if axis.part is None else shape[1:]
    dim = axis.dim if axis.part is None else axis.dim - 1
    kept = space.width_in(widths) * space.scale * axis.per_unit
    share = 1.0 if axis.part is None else min(chosen / shape[0], 1.0)
    size, out = space.size * axis.per_unit, matrix[1 - dim]
    return Consumer(space.layer, space.name, size, kept, out, axis.per_unit, share, axis.part is not None)


def _layer(layer: int, arch: ArchSpec, shapes: Mapping[str, tuple[int, ...]], widths: Widths, chosen: int) -> Layer:
    prefix, spaces = arch.layer_prefix(layer), list(arch.at(layer))
    stacked = tuple({f"{space.experts}." for space in spaces if space.experts is not None})
    products = 0.0
    for name, shape in shapes.items():
        if name.startswith(prefix) and len(shape) > 1:
            count = 1
            for length in shape:
                count *= length
            routed = bool(stacked) and name.startswith(stacked) and len(shape) > 2
            products += count * min(chosen / shape[0], 1.0) if routed else count
    removed = sum((space.width - space.width_in(widths)) * space.scale * space.unit_params for space in spaces)
    attention = sum(space.size * axis.per_unit for space in spaces if space.unit == GROUP for axis in space.into)
    wide = [
        space.size * axis.per_unit * (1 if axis.part is None else chosen) for space in spaces for axis in space.into
    ]
    whole = arch.layer_params[layer]
    return Layer(whole, max(whole - removed, 0), products, attention, max(wide, default=0))
