"""Divide a budget between tokens and layers by losses that are measured on held-out text."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedTokenizerBase

from ..arch.inference import evaluating
from ..arch.load import describe
from ..arch.meta import shrunk_skeleton
from ..arch.spec import MODEL, VOCAB, Widths
from ..steps.base import RunState
from ..steps.temporary import DIVISION_TOKENS
from ..system.stages import say
from ..vocabulary.amount import without_tokens
from ..vocabulary.choose import Ranking, VocabularyRequest
from ..widths.allocation import widths_of
from .trials import HeldOutText, Trials


@dataclass(frozen=True)
class DivisionTrial:
    """A measured division of the budget.

    Args:
        number: The number of kept tokens.
        token_loss: The loss with fewer tokens and dense layers.
        total_loss: The loss with fewer tokens and pruned layers.
    """

    number: int
    token_loss: float
    total_loss: float


def divide_budget(state: RunState, request: VocabularyRequest, ranking: Ranking) -> int:
    """Return the number of tokens to keep if tokens and units inside the layers share a budget.

    The first division meets the budget by tokens alone, if possible. The second division removes half the share of
    held-out tokens, and prunes the layers to meet the budget. If the second division has the smaller loss, a third
    division follows, with the smallest loss that the measured prices of the second division predict. The function
    returns the division with the smallest measured loss.

    Whole layers and whole experts are not pruned in trials. In this case, as many tokens as possible are removed.
    """
    assert request.budget is not None
    candidates = request.budget.candidates
    fewest = candidates[0]
    fewest_share = float(ranking.removed_shares[fewest])

    # Trials are not needed if the number is fixed, or if tokens that do not occur in the text meet the budget.
    costs_nothing = fewest_share == 0 and request.budget.is_met_by({VOCAB: fewest})
    if len(candidates) == 1 or costs_nothing or not _is_inside_layers(state, request.budget.smallest):
        return _tokens_in(division_widths(state, request, fewest))

    half = candidates[-1]
    for number in candidates[1:]:
        if float(ranking.removed_shares[number]) <= fewest_share / 2:
            half = number
            break

    with evaluating(state.model):
        division = Division(state, request, ranking)
        trials = [division.trial(fewest), division.trial(half)]

        if trials[1].total_loss < trials[0].total_loss:
            cheapest = _tokens_in(division_widths(state, request, division.cheapest(trials[1])))
            if cheapest not in [trial.number for trial in trials]:
                trials.append(division.trial(cheapest))

    best = min(trials, key=lambda trial: trial.total_loss)
    return best.number


def _tokens_in(widths: Widths) -> int:
    """Return the number of tokens of a division."""
    number = widths[VOCAB]
    assert isinstance(number, int)
    return number


def _is_inside_layers(state: RunState, names: Collection[str]) -> bool:
    """Return whether all spaces consist of units inside the layers."""
    spaces = [state.arch.of(name)[0] for name in names]
    return all(space.inside and space.layer != MODEL for space in spaces)


def division_widths(state: RunState, request: VocabularyRequest, number: int) -> Widths:
    """Return the widths of a division with `number` tokens or a few more.

    The other spaces have the largest widths that meet the budget. The steps of these widths are coarse, so the budget
    may leave room for some further tokens.
    """
    assert request.budget is not None
    if request.budget.is_met_by({VOCAB: number}):
        return {VOCAB: number}

    config = without_tokens(state.config, request.budget.budget.limits)
    assert config is not None
    skeleton = shrunk_skeleton(state.model, state.arch, {VOCAB: number})
    arch = describe(skeleton, state.config.arch_file)
    widths = widths_of(replace(config, allocation="uniform"), arch, skeleton)
    return {VOCAB: max(number, request.budget.largest(widths))} | dict(widths)


class Division:
    """Trials of divisions of the budget."""

    def __init__(self, state: RunState, request: VocabularyRequest, ranking: Ranking):
        def keep(number: int) -> tuple[Sequence[int], PreTrainedTokenizerBase]:
            kept = request.keep(ranking.order, number)
            return kept, request.vocabulary.smaller(kept)

        self.state = state
        self.request = request
        self.ranking = ranking
        self.trials = Trials(state, HeldOutText(state, request.vocabulary.tokenizer), DIVISION_TOKENS, keep)

    def trial(self, number: int) -> DivisionTrial:
        """Measure a division with `number` tokens or a few more."""
        widths = division_widths(self.state, self.request, number)
        number = _tokens_in(widths)
        token_loss = self.trials.loss({VOCAB: number})
        total_loss = token_loss
        if len(widths) > 1:
            total_loss = self.trials.loss(widths)

        shape = "".join(f", {name} {width:,}" for name, width in widths.items() if isinstance(width, int))
        say(f"trial: {shape[2:]}: loss {total_loss:.4f} ({token_loss:.4f} by tokens alone)")
        return DivisionTrial(number, token_loss, total_loss)

    def cheapest(self, trial: DivisionTrial) -> int:
        """Return the number of tokens with the smallest expected loss at the prices of a trial.

        The loss of tokens is proportional to the share of held-out tokens that is removed, and the loss of layers to
        their contribution to the budget:

            loss(n) = token_loss · removed(n) / removed(trial) + (total_loss - token_loss) · excess(n) / excess(trial)

        where excess(n) is the excess of a model with n tokens and dense layers over the limit.
        """
        assert self.request.budget is not None
        candidates = self.request.budget.candidates
        removed_shares = self.ranking.removed_shares[torch.tensor(candidates)]

        # The cost is linear in the number of tokens.
        budget = self.request.budget.budget
        first_excess = budget.cost({VOCAB: candidates[0]}) - budget.limit
        last_excess = budget.cost({VOCAB: candidates[-1]}) - budget.limit
        position = (torch.tensor(candidates) - candidates[0]) / (candidates[-1] - candidates[0])
        excess = (first_excess + position.double() * (last_excess - first_excess)).clamp(min=0)

        place = bisect_left(candidates, trial.number)
        price_of_tokens = trial.token_loss / max(float(removed_shares[place]), 1e-9)
        price_of_layers = (trial.total_loss - trial.token_loss) / max(float(excess[place]), 1.0)
        losses = price_of_tokens * removed_shares + price_of_layers * excess
        return candidates[int(losses.argmin())]
