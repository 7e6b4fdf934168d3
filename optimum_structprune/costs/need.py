"""How much memory a pruning takes at its peak. Numbers in, numbers out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..calibration.linalg import MAX_PANELS, PANEL
from ..criteria.obs import COLUMNS
from ..forward.metrics import TOKENS_AT_ONCE
from ..pruning.trials import STRIDE
from ..surgery.refit import ROWS
from .workload import Consumer, Layer, Workload


FP32, FP64 = 4, 8  # bytes
# How many activations of its widest matrix a layer holds at a time: both factors of a gated product, and the product.
WIDE = 3
# What tensors that are not counted here took in measurements, whatever the size of the model.
BESIDE = 60 * 10**6
# By how much the estimate of what comes on top of the model may lie off, either way; see docs/scaling.md.
ERROR = 0.15
# The share of a memory that tensors can fill, beside libraries and gaps between tensors.
USABLE = 0.95


@dataclass(frozen=True)
class Need:
    """The memory of one pruning at its peak, in bytes.

    Attributes:
        stage: What is done at the peak.
        weights: The weights that are on the compute device. Where layers are offloaded, these are two of them: the one
            that runs, and the next.
        hidden: The hidden states that are there, and the dense model's predictions that trials are compared with.
        working: Statistics, factors and activations at the peak.
        host: What the CPU's memory holds for another device or for the disk, where layers are offloaded.
    """

    stage: str
    weights: int
    hidden: int
    working: int
    host: int

    @property
    def device(self) -> int:
        """The bytes on the compute device."""
        return self.weights + self.hidden + self.working

    @property
    def above(self) -> int:
        """The bytes on the compute device on top of the model's weights."""
        return self.hidden + self.working

    def fits(self, memory: float) -> bool:
        """Whether it fits into a device of so many bytes even if the estimate is too low by its error."""
        return self.weights + self.above * (1 + ERROR) <= memory * USABLE


def need(work: Workload, offload: str | None = None, processes: int = 1) -> Need:
    """The memory that each of several processes takes on its device."""
    # One more than the residual streams, for what the attention gives, which does not run again.
    streams = work.hidden * work.itemsize * work.samples.tokens * (work.streams + 1) // processes
    inside = work.itemsize * sum(layer.parameters for layer in work.layers)
    largest = work.itemsize * max(layer.parameters for layer in work.layers)
    weights = work.weights if offload is None else min(work.weights, work.weights - inside + 2 * largest)
    host = 0 if offload is None else streams + (inside if offload == "cpu" else largest)
    kept = work.itemsize * work.vocab * work.choosing.probe // STRIDE
    hidden = kept + (streams if offload is None else 0)
    if work.rounds > 1:
        # Consumers that a round has masked keep their dense values until the last round.
        weights += work.itemsize * sum(consumer.size * consumer.out for consumer in work.consumers)
    stages = _stages(work, offload is not None)
    stage = max(stages, key=lambda name: stages[name])
    return Need(stage, weights, hidden, stages[stage] + BESIDE, host)


def _stages(work: Workload, offloaded: bool) -> Mapping[str, int]:
    """The largest working memory of every stage, in bytes."""
    stages = {
        "perplexity": _logits(work, offloaded),
        "forward pass": max(_activations(work, layer) for layer in work.layers),
        "removal": work.itemsize * max(layer.left for layer in work.layers if layer.parameters),
    }
    for consumer in work.consumers:
        layer = work.layers[consumer.layer]
        found = {
            "gathering": _gathering(work, consumer, layer),
            "scoring": _scoring(work, consumer),
            "refit": _refitting(work, consumer),
        }
        stages |= {name: max(size, stages.get(name, 0)) for name, size in found.items()}
    return stages


def _activations(work: Workload, layer: Layer) -> int:
    wide, tokens = max(layer.wide, work.hidden), work.samples.batch_tokens
    return work.itemsize * tokens * (WIDE * wide + 2 * work.hidden)


def _logits(work: Workload, offloaded: bool) -> int:
    """A loss takes logits in the model's dtype and twice in fp32, for few tokens at a time; where layers are
    offloaded, the head runs on a whole sample.
    """
    part = min(TOKENS_AT_ONCE, work.samples.length)
    whole = work.samples.length if offloaded else part
    return work.vocab * (whole * work.itemsize + part * 2 * FP32)


def _matrices(work: Workload, consumer: Consumer) -> int:
    """The fp32 copies of a consumer's dense and present weight."""
    return 2 * FP32 * consumer.out * consumer.size


def _cross(work: Workload, consumer: Consumer) -> int:
    """A cross-moment with the error."""
    return FP32 * consumer.out * consumer.size if work.feedback and not consumer.expert else 0


def _gathering(work: Workload, consumer: Consumer, layer: Layer) -> int:
    """Moments of the mixture and of one domain, beside the activations of one batch."""
    size, several = consumer.size, 2 if work.samples.domains > 1 else 1
    gram = FP32 * size * size if work.gram else 0
    # Products are computed in panels. What is 16 bits wide is copied to fp32, except for bf16 on CUDA.
    panel = FP32 * min(max(PANEL, -(-size // MAX_PANELS)), size) * size if work.gram else 0
    tokens = work.samples.batch_tokens
    inputs = tokens * size * (work.itemsize + (FP32 if work.itemsize < FP32 else 0))
    batch = max(_activations(work, layer), inputs + panel + 2 * FP32 * tokens * consumer.out)
    return several * (gram + _cross(work, consumer)) + batch + _matrices(work, consumer) + _routed(work, consumer)


def _routed(work: Workload, consumer: Consumer) -> int:
    """The tokens that enter the experts of a layer, which are kept until all its experts have been gone through."""
    return work.itemsize * work.samples.tokens * work.hidden if consumer.expert else 0


def _scoring(work: Workload, consumer: Consumer) -> int:
    """The moments, and where scores take a factor: the factor, and some columns of its inverse."""
    size = consumer.size
    gram = FP32 * size * size if work.gram else 0
    kept = gram + _cross(work, consumer) + _matrices(work, consumer) + _routed(work, consumer)
    if not work.factors:
        return kept
    # Those columns and those of the block before, and two copies in fp64.
    blocks = min(COLUMNS, size) * size * (2 * FP32 + 2 * FP64)
    domain = gram if work.apart and work.samples.domains > 1 else 0
    return kept + domain + gram + blocks


def _refitting(work: Workload, consumer: Consumer) -> int:
    """The moments, and the kept submatrix, which becomes its own factor."""
    if not work.fits:
        return 0
    size, kept, out = consumer.size, consumer.kept, consumer.out
    moments = FP32 * size * size + _cross(work, consumer) + FP32 * out * size + _routed(work, consumer)
    return moments + FP32 * (kept * kept + 4 * out * kept + min(ROWS, size) * kept)
