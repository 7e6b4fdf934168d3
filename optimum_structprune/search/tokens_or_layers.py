"""How many tokens stay where they compete with the layers for one budget: the number of the least measured loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from itertools import pairwise
from math import inf, isnan, log

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..arch.spec import VOCAB, Widths
from ..config.pruning import StructPruneConfig
from ..domains.packing import Domain
from ..errors import StructPruneError
from ..forward.metrics import evaluating, row_losses
from ..pruning.run import Run
from ..system.processes import broadcast_object
from ..system.stages import progress
from ..vocabulary.tokens import Vocabulary
from ..widths.allocation import legal_widths
from ..widths.budget import budget_of, budget_without_vocab, removed_parameters, token_numbers, widths_of
from ..widths.shapes import Curves
from .search import MEASURED_LOSSES, Search
from .trials import Probe, Trials


# So many numbers of tokens are compared, in equal ratios, and then so many halfway from the best to its neighbours.
NUMBERS, FINER = 6, 2
# Tokens that lose fewer nats than this are not compared with layers, which always lose some.
FREE = 2e-3
# What layers lose together is up to so many times what it was predicted to be; more says little of other widths.
MOST_GROWTH = 4.0
# At one width the loss is a power of the share that goes, between these; a loss of fewer nats is noise.
LEAST_POWER, MOST_POWER = 1.0, 2.0
LEAST_LOSS = 1e-4
# The hidden states of rows of tokens, shape `(tokens, channels)`.
Hidden = dict[tuple[int, ...], Tensor]


@dataclass(frozen=True)
class Balance:
    """A number of tokens, and what the model loses in nats per token of the dense vocabulary: because the others are
    gone, and because of what the layers still have to give up then, which a short pruning has `measured` or single
    layers predict.
    """

    tokens: int
    tokens_loss: float
    layers_loss: float
    measured: bool = False


def best_number(run: Run, vocabulary: Vocabulary, keep_of: Callable[[int], Sequence[int]], may: range) -> int:
    """The number of tokens that stay, in `may` or all of them, for the least total loss within a budget.

    The loss of tokens is measured on held-out text, which the dense model reads and predicts in the tokens that
    `keep_of` leaves; that of the layers follows from the trials of the search, which are made once, or at one width
    for all layers from two short prunings. A short pruning corrects what is predicted where the total is least: what
    layers lose one at a time adds up to less than they lose together. No layer is asked where tokens alone meet the
    budget and cost next to nothing.
    """
    report, (legal, numbers) = run.report, _numbers(run, may)
    with evaluating(run.model), report.timed("search"):
        loss_of = _losses_of_tokens(run, vocabulary, keep_of)
        fewest = Balance(numbers[0], loss_of(numbers[0]), 0.0, measured=True)
        alone = budget_without_vocab(run.config, run.arch, run.model, numbers[0], cut=False) is None
        balances = [fewest] if alone and fewest.tokens_loss < FREE else _compared(run, loss_of, legal, numbers)
    best = _best(balances)
    if best.layers_loss == inf:
        raise StructPruneError(
            f"budget={run.config.budget} is met by no widths of {run.config.shrinking}; allow more, or add targets."
        )
    balances.sort(key=lambda balance: -balance.tokens)
    report.balances = [{**vars(balance), "chosen": balance is best} for balance in balances]
    return best.tokens


def _losses_of_tokens(
    run: Run, vocabulary: Vocabulary, keep_of: Callable[[int], Sequence[int]]
) -> Callable[[int], float]:
    """What the model loses where so many tokens stay, in nats per token; each number is measured once."""
    model, data, known = run.model, run.data, Hidden()
    dense_losses = [row_losses(model, [*domain.trial], known=known).sum() for domain in data.domains]

    @cache
    def loss_of(number: int) -> float:
        losses = token_losses(model, vocabulary, data.domains, keep_of(number)[:number], dense_losses, known)
        loss = broadcast_object(data.total_loss(losses))
        return inf if isnan(loss) else max(0.0, loss)

    return loss_of


def _compared(
    run: Run, loss_of: Callable[[int], float], legal: Sequence[int], numbers: Sequence[int]
) -> list[Balance]:
    """Some of the legal numbers, from the largest of `numbers` to the least, and then some around the best."""
    layers = _AtOneWidth(run) if run.config.allocation == "uniform" else _Layers(run)
    waiting, balances = [*numbers], list[Balance]()
    for _ in progress(range(NUMBERS + FINER), desc="numbers of tokens", unit="number"):
        if not waiting:
            layers.correct_(balances)
        number = waiting.pop() if waiting else _between(balances, legal)
        if any(balance.tokens == number for balance in balances):  # nothing legal lies in between
            break
        # What goes beside other tokens costs nothing less than these alone; anything else is noise.
        more = (balance.tokens_loss for balance in balances if balance.tokens > number)
        balances.append(Balance(number, max([loss_of(number), *more]), layers.least_loss(number)))
    layers.correct_(balances)
    return balances


def _best(balances: Sequence[Balance]) -> Balance:
    return min(balances, key=lambda balance: balance.tokens_loss + balance.layers_loss)


def _between(balances: Sequence[Balance], legal: Sequence[int]) -> int:
    """The number of tokens in the middle of the wider gap beside the best one."""
    tried = sorted(balance.tokens for balance in balances)
    at = tried.index(_best(balances).tokens)
    low, high = max(
        pairwise(tried[max(at - 1, 0) : at + 2]), key=lambda gap: gap[1] - gap[0], default=(tried[at],) * 2
    )
    return min(legal, key=lambda number: abs(number - (low + high) / 2))


class _Layers:
    """What the layers lose for the sake of one budget, by how many tokens go; the trials are made once, and what they
    predict is multiplied by `factor`.
    """

    def __init__(self, run: Run):
        self.run = run
        self.trials: Trials | None = None
        self.shapes: dict[int, tuple[Search, Widths]] = {}
        self.factor = 1.0

    @cached_property
    def probe(self) -> Probe:
        """The text on which the loss of all layers together is measured."""
        return Probe.of(self.run.model, self.run.arch, self.run.data)

    def least_loss(self, number: int) -> float:
        """The predicted loss of the best shape with so many tokens; infinity where no shape keeps to the budget."""
        run = self.run
        rest = budget_without_vocab(run.config, run.arch, run.model, number, cut=False)
        if rest is None:
            return 0.0
        try:
            search = Search(run.model, run.arch, replace(run.data, config=rest))
            predicted = self.predicted(search)
        except StructPruneError:
            return inf
        if not predicted:
            return inf
        # Processes could part ways here, in the last digit of a loss or at a time limit, and would then wait for ever.
        loss, shape = broadcast_object(min(predicted, key=lambda pair: pair[0]))
        self.shapes[number] = search, shape
        return inf if isnan(loss) else self.factor * loss

    def predicted(self, search: Search) -> list[tuple[float, Widths]]:
        """The shapes that keep to a budget, each with what single layers predict that it loses."""
        candidates = search.candidates(self._curves(search))
        return [(of.predicted, of.widths) for of in candidates if of.predicted is not None]

    def correct_(self, balances: list[Balance]) -> None:
        """Measure the loss in the layers where the total is least, until that is measured; predictions change by as
        much.
        """
        while not (best := _best(balances)).measured:
            loss = self._loss_together(best.tokens) if best.tokens in self.shapes else best.layers_loss
            growth = min(loss / best.layers_loss, MOST_GROWTH) if best.layers_loss and loss < inf else 1.0
            self.factor *= growth
            for at, of in enumerate(balances):
                if of is best:
                    balances[at] = replace(of, layers_loss=loss, measured=True)
                elif not of.measured:
                    balances[at] = replace(of, layers_loss=growth * of.layers_loss)

    def _loss_together(self, number: int) -> float:
        search, shape = self.shapes[number]
        return search.loss(shape, self.probe)

    def _curves(self, search: Search) -> Curves:
        if self.trials is None:
            self.trials = search.trials()
            self.run.data.cache[MEASURED_LOSSES] = self.trials.losses()
        return self.trials.curves(self.run.data.cache[MEASURED_LOSSES])


class _AtOneWidth(_Layers):
    """The same where each space keeps one width in all layers: the loss is a power of the share of the layers that
    goes, which two short prunings give.
    """

    power: float | None = None

    def predicted(self, search: Search) -> list[tuple[float, Widths]]:
        """See `_Layers.predicted`."""
        if self.power is None:
            half = Search(search.model, search.arch, replace(search.data, config=_half_of(search)))
            both = [(_share(of), max(of.loss(of.plain, self.probe), LEAST_LOSS)) for of in (search, half)]
            (share, loss), (less, of_less) = both
            steep = share > less > 0 and inf not in (loss, of_less)
            power = log(loss / of_less) / log(share / less) if steep else LEAST_POWER
            self.power = min(max(power, LEAST_POWER), MOST_POWER)
            self.factor = loss / share**self.power
        return [(_share(search) ** self.power, search.plain)]


def _half_of(search: Search) -> StructPruneConfig:
    """The config that asks half as much of the layers."""
    budget = budget_of(search.config, search.arch, search.model, list(search.plain))
    return replace(search.config, budget={budget.name: (budget.limit + budget.dense) // 2})


def _share(search: Search) -> float:
    """The share of the parameters of the layers that goes at one width."""
    return removed_parameters(search.arch, search.plain) / sum(search.arch.layer_params)


def _numbers(run: Run, may: range) -> tuple[list[int], list[int]]:
    """The numbers of tokens that may be, and those that are compared first, ascending; the largest that meets the
    budget alone is one of these.
    """
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
    return numbers, sorted({enough, space.size, *(min(numbers, key=lambda of: abs(of - step)) for step in steps)})


def token_losses(
    model: PreTrainedModel,
    vocabulary: Vocabulary,
    domains: Sequence[Domain],
    keep: Sequence[int],
    dense_losses: Sequence[Tensor],
    known: Hidden | None = None,
) -> Tensor:
    """What a causal model loses in nats per token of its own vocabulary where it reads and predicts only those of
    `keep`, on the text of each domain that choices are made on; shape `(domains,)`, fp64. `dense_losses` are its
    total losses on these texts, and `known` keeps its hidden states by row.
    """
    kept, among = set(keep), torch.tensor(keep)
    if len(kept) == len(model.get_input_embeddings().get_parameter("weight")):
        return torch.zeros(len(domains), dtype=torch.float64)
    losses = []
    for domain, before in zip(domains, dense_losses, strict=True):
        rows = [spelled(row.tolist(), vocabulary, kept) for row in domain.trial]
        losses.append((row_losses(model, rows, among, known).sum() - before) / domain.trial[:, 1:].numel())
    return torch.stack(losses)


def spelled(row: Sequence[int], vocabulary: Vocabulary, kept: set[int]) -> Tensor:
    """A row of dense tokens in those that stay, of the first token, which is context only, the last one."""
    first, *rest = ([token] if token in kept else [*vocabulary.parts(token, kept)] or [token] for token in row)
    return torch.tensor([*first[-1:], *(token for of in rest for token in of)])
