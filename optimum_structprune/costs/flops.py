"""What a pruning computes, reads and writes. Numbers in, numbers out."""

from __future__ import annotations

from dataclasses import astuple, dataclass, replace

from ..calibration.linalg import panels
from ..criteria.obs import COLUMNS
from ..pruning.trials import SHARES, STRIDE
from .workload import Consumer, Workload


BACKWARD = 1  # forward passes that a backward pass costs where the weights are frozen
FP32 = 4  # bytes


@dataclass(frozen=True)
class Flops:
    """Floating-point operations; a multiplication and an addition are two.

    Attributes:
        forward: Forward passes over the samples, in the dtype of the model.
        statistics: Gram matrices and cross-moments.
        scoring: Factors of Gram matrices and their inverses, in fp32.
        refit: Products with Gram matrices, factors and solutions, in fp32.
    """

    forward: float
    statistics: float
    scoring: float
    refit: float

    def times(self, number: float) -> Flops:
        """A multiple of these."""
        return Flops(*(number * count for count in astuple(self)))

    def plus(self, other: Flops) -> Flops:
        """The sums of these and others."""
        return Flops(*(mine + more for mine, more in zip(astuple(self), astuple(other), strict=True)))

    @property
    def shared(self) -> float:
        """What several processes share."""
        return self.forward + self.statistics

    @property
    def total(self) -> float:
        """All of them."""
        return self.shared + self.scoring + self.refit


@dataclass(frozen=True)
class Traffic:
    """Bytes that move.

    Attributes:
        read: What is read from the disk: the weights once, and again for every stream of layers from there.
        written: What is written to the disk: the result, smaller layers that go back there, and the checkpoint.
        copied: What goes to the compute device and back, where layers are offloaded.
        summed: The moments that processes add up.
    """

    read: int
    written: int
    copied: int
    summed: int


def flops(work: Workload) -> Flops:
    """The operations of a pruning."""
    rounds = _sweep(work).times(work.rounds)
    measured = Flops(_perplexities(work) + _watched(work) + _learned(work), 0.0, 0.0, 0.0)
    return rounds.plus(measured).plus(_chosen(work))


def traffic(work: Workload, offload: str | None = None, checkpoint: bool = False, processes: int = 1) -> Traffic:
    """The bytes that move."""
    outside = work.itemsize * work.outside
    dense, small = work.weights - outside, work.result - outside
    # Each round streams the layers twice, once to record how they are called; each perplexity does the same.
    passes = 2 * work.rounds + 2 + _streams(work)
    streamed = passes * dense + 2 * small
    returned = (work.rounds - 1 + work.choosing.finals) * dense + small
    stored = work.samples.tokens * work.hidden * work.itemsize * work.streams
    # The result is read once more, to check that it loads.
    read = work.weights + work.result + (streamed + small if offload == "disk" else 0)
    written = work.result + (returned if offload == "disk" else 0)
    written += (small + len(work.layers) * stored) if checkpoint else 0
    copied = streamed + returned + _carried(work, stored) if offload is not None else 0
    parts = sum(
        FP32 * c.size**2 + (FP32 * c.size * c.out if work.feedback and not c.expert else 0) for c in work.consumers
    )
    sweeps = work.rounds + work.choosing.ranked + bool(work.choosing.probe) + work.choosing.finals
    summed = sweeps * work.samples.domains * parts if processes > 1 and work.gram else 0
    return Traffic(read, written, copied, summed)


def divided(work: Workload) -> float:
    """The operations of scores and refits that several processes divide: those of trials, each layer in one process.

    The moments of experts are not kept until every process has its layer, so their trials wait for each other.
    """
    if not work.choosing.probe:
        return 0.0
    found = _trials(replace(_unpruned(work), consumers=tuple(one for one in work.consumers if not one.expert)))
    return found.scoring + found.refit


def repeated(work: Workload) -> float:
    """The operations of forward passes that every process makes: those that take the text of trials along."""
    return _along(work) if work.choosing.probe else 0.0


def _sweep(work: Workload, fixed: bool = False) -> Flops:
    """One round, or one pass over layers that are fixed."""
    consumers = work.consumers
    return Flops(
        _round(work, fixed),
        sum(_moments(work, consumer) for consumer in consumers),
        sum(_scores(work, consumer) for consumer in consumers),
        sum(_refit(consumer) for consumer in consumers) if work.fits else 0.0,
    )


def _chosen(work: Workload) -> Flops:
    """What chooses the widths before the first round: a ranking, a comparison of layers, or trials."""
    plan, nothing = work.choosing, Flops(0.0, 0.0, 0.0, 0.0)
    dense = _unpruned(work)
    if plan.ranked:
        return _sweep(replace(dense, feedback=False, fits=False), fixed=True)
    if plan.judged:
        return replace(nothing, forward=_whole(work, work.samples.tokens, work.samples.tokens))
    if not plan.probe:
        return nothing
    part = replace(dense, samples=replace(work.samples, count=plan.samples))
    final = _sweep(part).plus(replace(nothing, forward=_whole(work, plan.probe, plan.probe / STRIDE)))
    return _trials(dense).plus(final.times(plan.finals))


def _unpruned(work: Workload) -> Workload:
    """One round in which nothing shrinks, as on trial."""
    return replace(work, layers=tuple(replace(layer, left=layer.parameters) for layer in work.layers), rounds=1)


def _along(work: Workload) -> float:
    """A pass over the text of trials that tells how the layers are called, one for the predictions of the dense model,
    and one from layer to layer.
    """
    probe = work.choosing.probe
    return 2 * _whole(work, probe, probe / STRIDE) + sum(
        _pass(work, layer, probe) for layer in range(len(work.layers))
    )


def _trials(work: Workload) -> Flops:
    """Each space of each layer gives up a part, while all others are dense."""
    work = replace(work, feedback=False)
    probe, kept = work.choosing.probe, [1 - share for share in SHARES]
    forward = _round(work, fixed=True) + _along(work)
    for layer in range(len(work.layers)):
        spaces = len(_gathered(work, layer))
        behind = _whole(work, probe, probe / STRIDE, layer)
        forward += spaces * len(kept) * behind
        if work.choosing.without_layers:
            forward += _whole(work, probe, probe / STRIDE, layer + 1)
    consumers = work.consumers
    refits = [_refit(replace(one, kept=max(int(one.size * share), 1))) for one in consumers for share in kept]
    return Flops(
        forward,
        sum(_moments(work, consumer) for consumer in consumers),
        sum(_scores(work, consumer) for consumer in consumers),
        sum(refits) if work.fits else 0.0,
    )


def _whole(work: Workload, tokens: float, predicted: float, first: int = 0) -> float:
    """A pass through the layers from one on and through the head, which predicts for some of the tokens."""
    layers = sum(_pass(work, layer, tokens) for layer in range(first, len(work.layers)))
    return layers + 2 * predicted * work.vocab * work.hidden


def _streams(work: Workload) -> int:
    """How often all layers are read again to choose the widths, where they are offloaded."""
    plan, depth = work.choosing, len(work.layers)
    if plan.judged:
        return -(-work.samples.count // max(work.samples.batch, 1))
    if not plan.probe:
        return 2 * plan.ranked
    # A trial reads the layers behind it once for each batch, which is half of them in the mean.
    trials = sum(len(SHARES) * len(_gathered(work, layer)) * (depth - layer) for layer in range(depth))
    return 3 + plan.probe_batches * (1 + -(-trials // depth)) + plan.finals * (2 + plan.probe_batches)


def _carried(work: Workload, stored: int) -> int:
    """The hidden states that come to the device and go back: those of each pass, and on to the next layer."""
    gathering = sum(len(_gathered(work, layer)) for layer in range(len(work.layers)))
    return work.rounds * stored * (2 * len(work.layers) + gathering)


def _pass(work: Workload, layer: int, tokens: float) -> float:
    """One layer on so many tokens. Its attention multiplies all pairs of tokens of a sample."""
    found = work.layers[layer]
    return 2 * tokens * (found.products + 2 * work.samples.length * found.attention)


def _gathered(work: Workload, layer: int) -> list[bool]:
    """One entry for each pass that gathers moments: whether experts are routed in it, all of them in one."""
    spaces = {consumer.space: consumer.expert for consumer in work.at(layer)}
    return [expert for expert in spaces.values() if not expert] + [True] * any(spaces.values())


def _round(work: Workload, fixed: bool = False) -> float:
    """The passes of one round: one that records the calls on a batch, one for each space that loses units, one on to
    the next layer, one of the dense residual stream, and what finds out how far a consumer's output reaches. Where
    layers are fixed, what a layer gives while it is observed goes on to the next one.
    """
    samples, total = work.samples, 0.0
    for layer in range(len(work.layers)):
        gathered = _gathered(work, layer)
        again = layer + 1 < len(work.layers) and not (fixed and False in gathered)
        passes = len(gathered) + again * _onward(work, layer) + work.feedback
        # How far an output reaches is found out in the first layer, for the others too.
        probes = 2 * gathered.count(False) if work.feedback and layer == 0 else 0
        total += passes * _pass(work, layer, samples.tokens)
        total += (probes + 1) * _pass(work, layer, min(samples.batch_tokens, samples.tokens))
        for consumer in work.at(layer):
            if consumer.expert:
                # What enters an expert's consumer is computed again, by matrices twice as large where they are gated.
                total += 4 * consumer.share * samples.tokens * consumer.out * consumer.size
    return total


def _onward(work: Workload, layer: int) -> float:
    """A pass on to the next layer, which in the last round goes through a smaller layer."""
    left = work.layers[layer].left / max(work.layers[layer].parameters, 1)
    return (work.rounds - 1 + left) / work.rounds


def _perplexities(work: Workload) -> float:
    """Held-out text through the dense model and through the smaller one."""
    tokens, head = work.samples.heldout * work.samples.length, work.vocab * work.hidden
    dense = sum(_pass(work, layer, tokens) for layer in range(len(work.layers)))
    left = sum(found.left for found in work.layers) / max(sum(found.parameters for found in work.layers), 1)
    return dense * (1 + left) + 4 * tokens * head


def _watched(work: Workload) -> float:
    """The passes through the whole model that a criterion takes before each round."""
    tokens = work.samples.tokens
    layers = sum(_pass(work, layer, tokens) for layer in range(len(work.layers)))
    return work.rounds * work.views * (1 + BACKWARD * work.gradient) * (layers + 2 * tokens * work.vocab * work.hidden)


def _learned(work: Workload) -> float:
    """The steps in which gates are learned: the dense model, the gated one, and back through it."""
    layers = sum(_pass(work, layer, work.learning) for layer in range(len(work.layers)))
    return (2 + BACKWARD) * (layers + 2 * work.learning * work.vocab * work.hidden)


def _moments(work: Workload, consumer: Consumer) -> float:
    """The part of the Gram matrix that is computed, and the cross-moment with the error."""
    if not work.gram:
        return 0.0
    tokens, size = work.samples.tokens * consumer.share, consumer.size
    half = sum((rows.stop - rows.start) * (size - rows.start) for rows in panels(size))
    energy = 2 * work.samples.domains * size**2 * consumer.out if consumer.expert else 0
    return 2 * tokens * (half + (consumer.out * size if work.feedback and not consumer.expert else 0)) + energy


def _scores(work: Workload, consumer: Consumer) -> float:
    """A Cholesky factor, its inverse, and the blocks of the inverse Gram matrix on its diagonal."""
    if not work.factors:
        return 0.0
    times, size = work.samples.domains if work.apart else 1, consumer.size
    # The columns of the inverse are solved for in blocks, each from its first row that is not zero.
    inverse = sum((size - start) ** 2 * min(COLUMNS, size - start) for start in range(0, size, COLUMNS))
    return times * (size**3 / 3 + inverse + size**2 * consumer.per_unit)


def _refit(consumer: Consumer) -> float:
    """What removed columns leave to make up for, a Cholesky factor, and the solution."""
    size, kept, out = consumer.size, consumer.kept, consumer.out
    return 2 * out * (size - kept) * kept + kept**3 / 3 + 2 * out * kept**2
