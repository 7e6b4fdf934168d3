"""How many tokens stay where they compete with the layers for one budget: the number of the least measured loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import exp, inf, isnan, log

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..arch.spec import VOCAB, Widths
from ..errors import StructPruneError
from ..forward.metrics import evaluating, row_losses
from ..pruning.measure import short_rows
from ..pruning.run import Run
from ..system.processes import broadcast_object
from ..system.stages import progress
from ..vocabulary.tokens import Vocabulary
from ..widths.allocation import legal_widths
from ..widths.budget import budget_without_vocab, removed_parameters, token_numbers, widths_of
from .search import MEASURED_LOSSES, Search
from .trials import Curves, Probe, Trials


# So many numbers of tokens are considered, in equal ratios, and so many of them measured at most.
NUMBERS, MOST_COMPARED = 16, 8
# What tokens lose is measured on so many tokens of all domains together.
MEASURED_TOKENS = 4096
# A number that is predicted to lose less than the best by a smaller share of its loss is not measured.
LEAST_GAIN = 0.03
# Tokens that lose fewer nats than this are not compared with layers, which always lose some.
FREE = 2e-3
# What layers lose together is up to so many times what it was predicted to be; more says little of other widths.
MOST_GROWTH = 4.0
# At one width the loss is a power of the share that goes, between these. On SmolLM2 it was about 3 times the first;
# short prunings correct that.
USUAL_LOSS, USUAL_POWER = 3.0, 1.25
LEAST_POWER, MOST_POWER = 1.0, 2.0
# The hidden states of rows of tokens, shape `(tokens, channels)`.
Hidden = dict[tuple[int, ...], Tensor]


@dataclass(frozen=True)
class Balance:
    """A number of tokens, and what the model loses in nats per token of the dense vocabulary: because the others are
    gone, and because of what the layers still have to give up then, which a short pruning has `measured`, or which
    is predicted.
    """

    tokens: int
    tokens_loss: float
    layers_loss: float
    measured: bool = False

    @property
    def loss(self) -> float:
        """The loss of tokens and layers together."""
        return self.tokens_loss + self.layers_loss


def best_number(run: Run, vocabulary: Vocabulary, keep_of: Callable[[int], Sequence[int]], may: range) -> int:
    """The number of tokens that stay, in `may` or all of them, for the least total loss within a budget.

    The loss of tokens is measured on text that choices are made on, which the dense model reads and predicts in the
    tokens that `keep_of` leaves; that of the layers follows from the trials of the search, which are made once, or at
    one width for all layers from short prunings. The number of the least predicted total is measured, and then others
    while one is predicted to lose less. No layer is asked where tokens alone meet the budget and cost next to nothing.
    """
    report, numbers = run.report, _numbers(run, may)
    with evaluating(run.model), report.timed("search"):
        tokens = _Tokens(run, vocabulary, keep_of)
        tokens.measure_(numbers[0])
        alone = budget_without_vocab(run.config, run.arch, run.model, numbers[0], cut=False) is None
        fewest = Balance(numbers[0], tokens.loss(numbers[0]), 0.0, measured=True)
        balances = [fewest] if alone and fewest.loss < FREE else _compared(tokens, _Layers(run), numbers)
    best = _best(balances)
    if best is None:
        raise StructPruneError(
            f"budget={run.config.budget} is met by no widths of {run.config.shrinking}; allow more, or add targets."
        )
    report.balances = [{**vars(balance), "chosen": balance is best} for balance in balances]
    return best.tokens


def _compared(tokens: _Tokens, layers: _Layers, numbers: Sequence[int]) -> list[Balance]:
    """The numbers of tokens that were measured, the largest first. Of all `numbers`, the one of the least predicted
    loss is measured next; its layers, which take longer, only if it is still better than those before.
    """

    def balance(number: int) -> Balance:
        return Balance(number, tokens.loss(number), layers.loss(number), number in layers.measured)

    # Near the fewest the loss falls faster than on the line to that of all tokens, which would promise too little.
    tokens.measure_(numbers[len(numbers) // 4])
    for _ in progress(range(MOST_COMPARED), desc="numbers of tokens", unit="number"):
        every = [balance(number) for number in numbers]
        best, known = min(every, key=lambda of: of.loss), _best([of for of in every if of.tokens in tokens.measured])
        least = inf if known is None else known.loss
        if best.loss >= (1 - LEAST_GAIN) * least:
            break
        tokens.measure_(best.tokens)
        if not best.measured and balance(best.tokens).loss < least:
            layers.measure_(best.tokens)
    return [balance(number) for number in reversed(numbers) if number in tokens.measured]


def _best(balances: Sequence[Balance]) -> Balance | None:
    """The measured number of the least loss, if any keeps to the budget."""
    measured = [balance for balance in balances if balance.measured and balance.loss < inf]
    return min(measured, key=lambda balance: balance.loss, default=None)


class _Tokens:
    """What the model loses because tokens are gone, by the number of those that stay: `measured`, in nats per token,
    on a fair share of the text of each domain that choices are made on.
    """

    def __init__(self, run: Run, vocabulary: Vocabulary, keep_of: Callable[[int], Sequence[int]]):
        self.run, self.vocabulary, self.keep_of, domains = run, vocabulary, keep_of, run.data.domains
        self.measured = {run.arch.of(VOCAB)[0].size: 0.0}
        self.known = Hidden()
        self.texts = [short_rows(domain.trial, MEASURED_TOKENS // len(domains)) for domain in domains]
        self.dense_losses = [row_losses(run.model, rows, known=self.known).sum() for rows in self.texts]

    def measure_(self, number: int) -> None:
        """Measure the loss where so many tokens stay."""
        if number not in self.measured:
            keep = self.keep_of(number)[:number]
            losses = token_losses(self.run.model, self.vocabulary, self.texts, keep, self.dense_losses, self.known)
            loss = broadcast_object(self.run.data.total_loss(losses))
            self.measured[number] = inf if isnan(loss) else max(0.0, loss)

    def loss(self, number: int) -> float:
        """The loss, whose logarithm is a straight line between numbers that were measured."""
        if number in self.measured:
            return self.measured[number]
        low, high = (max(n for n in self.measured if n < number), min(n for n in self.measured if n > number))
        ends = [log(max(self.measured[end], FREE)) for end in (low, high)]
        return exp(ends[0] + (ends[1] - ends[0]) * (number - low) / (high - low))


class _Layers:
    """What the layers lose for the sake of one budget, by the number of tokens that stay: `factor` times a power of
    what the trials of single layers add up to, which are made once, or at one width of the share that goes.
    """

    def __init__(self, run: Run):
        self.run = run
        self.at_one_width = run.config.allocation == "uniform"
        self.factor, self.power = (USUAL_LOSS, USUAL_POWER) if self.at_one_width else (1.0, 1.0)
        self.measured: dict[int, float] = {}
        self.shapes: dict[int, tuple[Search, Widths, float] | None] = {}
        self.last: tuple[float, float] | None = None  # the size and the loss that were measured last
        self.trials: Trials | None = None

    @cached_property
    def probe(self) -> Probe:
        """The text on which the loss of all layers together is measured."""
        return Probe.of(self.run.model, self.run.arch, self.run.data)

    def loss(self, number: int) -> float:
        """The loss with so many tokens; infinity where no shape keeps to the budget."""
        if number not in self.measured and number not in self.shapes:
            self._find_shape_(number)
        if number in self.measured:
            return self.measured[number]
        shape = self.shapes[number]
        return inf if shape is None else self.factor * shape[2] ** self.power

    def measure_(self, number: int) -> None:
        """Measure the loss with so many tokens by a short pruning, and correct the others by it."""
        predicted, shape = self.loss(number), self.shapes[number]
        assert shape is not None  # what cannot be is not measured
        search, widths, size = shape
        loss = search.loss(widths, self.probe)
        if 0 < loss < inf and predicted:
            before, self.last = self.last, (size, loss)
            if self.at_one_width and before is not None and before[0] != size:
                power = log(loss / before[1]) / log(size / before[0])
                self.power = min(max(power, LEAST_POWER), MOST_POWER)
            self.factor = min(loss, MOST_GROWTH * predicted) / size**self.power
        self.measured[number] = loss

    def _find_shape_(self, number: int) -> None:
        """Find the shape of the least predicted loss, or that the layers need not give up anything."""
        run, self.shapes[number] = self.run, None
        rest = budget_without_vocab(run.config, run.arch, run.model, number, cut=False)
        if rest is None:
            self.measured[number] = 0.0
            return
        try:
            search = Search(run.model, run.arch, replace(run.data, config=rest))
            shapes = self._predicted(search)
        except StructPruneError:
            return
        # Processes could part ways here, in the last digit of a loss, and would then wait for ever.
        size, widths = broadcast_object(min(shapes, key=lambda pair: pair[0]))
        if not isnan(size):
            self.shapes[number] = search, widths, size

    def _predicted(self, search: Search) -> list[tuple[float, Widths]]:
        """The shapes that keep to a budget, each with what single layers predict that it loses, or at one width the
        share of the layers that goes.
        """
        if self.at_one_width:
            return [(removed_parameters(search.arch, search.plain) / sum(search.arch.layer_params), search.plain)]
        candidates = search.candidates(self._curves(search))
        return [(of.predicted, of.widths) for of in candidates if of.predicted is not None]

    def _curves(self, search: Search) -> Curves:
        if self.trials is None:
            self.trials = search.trials()
            self.run.data.cache[MEASURED_LOSSES] = self.trials.losses()
        return self.trials.curves(self.run.data.cache[MEASURED_LOSSES])


def _numbers(run: Run, may: range) -> list[int]:
    """The numbers of tokens that are considered, ascending; the largest that meets the budget alone is among them."""
    config, arch, model = run.config, run.arch, run.model
    space, numbers = arch.of(VOCAB)[0], token_numbers(config, arch, legal_widths(config, arch, model.config), may)
    try:
        alone = widths_of(replace(config, targets=(VOCAB,), allocation="uniform", losses_dir=None), arch, model)
        most = space.width_in(alone)
        enough = max((number for number in numbers if number <= most), default=numbers[0])
    except StructPruneError:
        enough = numbers[0]
    # The first units of the layers cost next to nothing, so that the best number is often little above the least.
    steps = (enough * (space.size / enough) ** (step / (NUMBERS - 1)) for step in range(NUMBERS))
    return sorted({enough, space.size, *(min(numbers, key=lambda of: abs(of - step)) for step in steps)})


def token_losses(
    model: PreTrainedModel,
    vocabulary: Vocabulary,
    texts: Sequence[Sequence[Tensor]],
    keep: Sequence[int],
    dense_losses: Sequence[Tensor],
    known: Hidden | None = None,
) -> Tensor:
    """What a causal model loses in nats per token of its own vocabulary where it reads and predicts only those of
    `keep`, on each of several texts, in rows of token ids; shape `(texts,)`, fp64. `dense_losses` are its total losses
    on these, and `known` keeps its hidden states by row.
    """
    kept, among = set(keep), torch.tensor(keep)
    losses = []
    for rows, before in zip(texts, dense_losses, strict=True):
        shorter = [spelled(row.tolist(), vocabulary, kept) for row in rows]
        losses.append((row_losses(model, shorter, among, known).sum() - before) / sum(len(row) - 1 for row in rows))
    return torch.stack(losses)


def spelled(row: Sequence[int], vocabulary: Vocabulary, kept: set[int]) -> Tensor:
    """A row of dense tokens in those that stay, of the first token, which is context only, the last one."""
    first, *rest = ([token] if token in kept else [*vocabulary.parts(token, kept)] or [token] for token in row)
    return torch.tensor([*first[-1:], *(token for of in rest for token in of)])
