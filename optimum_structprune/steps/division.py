"""Divide a budget between tokens and layers by losses that are measured on held-out text."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection
from copy import copy, deepcopy
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..arch.inference import last_states
from ..arch.load import describe
from ..arch.meta import positions_of, shrunk_skeleton
from ..arch.spec import MODEL, VOCAB, Widths
from ..domains.packing import Domain, Passages, cut_to_positions
from ..forward.metrics import evaluating, row_losses
from ..system.processes import broadcast_object
from ..system.stages import say
from ..vocabulary.amount import without_tokens
from ..vocabulary.choose import Ranking, VocabularyRequest
from ..widths.allocation import widths_of
from .base import RunState
from .resize import drop_tokens_
from .temporary import temporarily_pruned


# The number of calibration tokens of a trial, and the number of held-out tokens that measure it.
CALIBRATION_TOKENS = 8192
MEASURED_TOKENS = 8192
# The number of tokens in a piece of held-out text.
PIECE = 64
# The number of tokens in a batch of short texts.
BATCH_TOKENS = 512


@dataclass(frozen=True)
class Trial:
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
        return division_widths(state, request, fewest).number

    half = candidates[-1]
    for number in candidates[1:]:
        if float(ranking.removed_shares[number]) <= fewest_share / 2:
            half = number
            break

    with evaluating(state.model):
        division = Division(state, request, ranking)
        trials = [division.trial(fewest), division.trial(half)]

        if trials[1].total_loss < trials[0].total_loss:
            cheapest = division_widths(state, request, division.cheapest(trials[1]))
            if cheapest.number not in [trial.number for trial in trials]:
                trials.append(division.trial(cheapest.number))

    best = min(trials, key=lambda trial: trial.total_loss)
    return best.number


def _is_inside_layers(state: RunState, names: Collection[str]) -> bool:
    """Return whether all spaces consist of units inside the layers."""
    spaces = [state.arch.of(name)[0] for name in names]
    return all(space.inside and space.layer != MODEL for space in spaces)


class DivisionWidths(NamedTuple):
    """The widths of a division.

    Attributes:
        number: The number of tokens.
        widths: The widths of the other spaces. Spaces that are not in it keep their full width.
    """

    number: int
    widths: Widths


def division_widths(state: RunState, request: VocabularyRequest, number: int) -> DivisionWidths:
    """Return the widths of a division with `number` tokens or a few more.

    The other spaces have the largest widths that meet the budget. The steps of these widths are coarse, so the budget
    may leave room for some further tokens.
    """
    assert request.budget is not None
    if request.budget.is_met_by({VOCAB: number}):
        return DivisionWidths(number, {})

    config = without_tokens(state.config, request.budget.budget.limit)
    assert config is not None
    skeleton = shrunk_skeleton(state.model, state.arch, {VOCAB: number})
    arch = describe(skeleton, state.config.arch_file)
    widths = widths_of(replace(config, allocation="uniform"), arch, skeleton)
    return DivisionWidths(max(number, request.budget.largest(widths)), widths)


class Division:
    """Trials of divisions on the model of a run. The model is dense again after each trial."""

    def __init__(self, state: RunState, request: VocabularyRequest, ranking: Ranking):
        self.state = state
        self.request = request
        self.ranking = ranking
        self.text = HeldOutText(state, request.vocabulary.tokenizer)

    def trial(self, number: int) -> Trial:
        """Measure a division with `number` tokens or a few more."""
        state = self.state
        number, widths = division_widths(state, self.request, number)
        keep = self.request.keep(self.ranking.order, number)
        tokenizer = self.request.vocabulary.smaller(keep)

        # The copy shares its weights with the model, so it is pruned with the model.
        smaller = copy_with_shared_weights(state.model)
        drop_tokens_(smaller, state.arch, keep)

        token_loss = self.text.loss(smaller, tokenizer)
        total_loss = token_loss
        if widths:
            with temporarily_pruned(state.model, state.arch, state.data, widths, CALIBRATION_TOKENS):
                total_loss = self.text.loss(smaller, tokenizer)

        shape = "".join(f", {name} {width}" for name, width in widths.items() if isinstance(width, int))
        say(f"trial: vocab {number:,}{shape}: loss {total_loss:.4f} ({token_loss:.4f} by tokens alone)")
        token_loss, total_loss = broadcast_object((token_loss, total_loss))
        return Trial(number, token_loss, total_loss)

    def cheapest(self, trial: Trial) -> int:
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


def copy_with_shared_weights(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy of a model whose parameters share memory with the parameters of the model."""
    return deepcopy(model, {id(parameter): copy(parameter) for parameter in model.parameters()})


class HeldOutText:
    """Held-out text by domain, to compare models with different tokenizers.

    The loss of a causal language model is the increase of its loss in nats per token of the dense model. For another
    model, a piece has the loss 1 - cos, from the mean last hidden states of both models, and the loss is the mean over
    pieces.
    """

    def __init__(self, state: RunState, tokenizer: PreTrainedTokenizerBase):
        self.data = state.data
        self.causal = state.arch.causal
        tokens = MEASURED_TOKENS // len(state.data.domains)
        self.pieces = [_pieces(domain, tokens) for domain in state.data.domains]
        if self.causal:
            positions = positions_of(state.model)
            self.pieces = [cut_to_positions(pieces, tokenizer, positions) for pieces in self.pieces]
        self.passages = [Passages(list(pieces), tokenizer) for pieces in self.pieces]

        self.dense_losses = torch.zeros(len(self.passages))
        self.dense_states: list[Tensor] = []
        if self.causal:
            self.dense_losses = self._losses(state.model, tokenizer)
        else:
            self.dense_states = self._states(state.model, tokenizer)

    def loss(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> float:
        """Return the mean loss of a smaller model over the domains."""
        if self.causal:
            return float(self.data.mean(self._losses(model, tokenizer) - self.dense_losses))

        losses = []
        for states, dense_states in zip(self._states(model, tokenizer), self.dense_states, strict=True):
            losses.append(1 - cosine_similarity(states, dense_states).mean())
        return float(self.data.mean(torch.stack(losses)))

    def _losses(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Tensor:
        """Return the loss of each domain in nats per dense token, shape `(domains,)`."""
        losses = []
        for pieces, passages in zip(self.pieces, self.passages, strict=True):
            rows = sorted(passages.rows(tokenizer, model), key=len)
            losses.append(row_losses(model, rows, BATCH_TOKENS).sum() / pieces[:, 1:].numel())
        return torch.stack(losses)

    @torch.no_grad()
    def _states(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[Tensor]:
        """Return the mean last hidden state of each piece by domain, shape `(pieces, channels)` each."""
        max_length = int(min(positions_of(model) - 2, 4 * PIECE))
        by_domain = []
        with evaluating(model):
            for passages in self.passages:
                states = []
                for documents in passages.texts:
                    ids = tokenizer("\n".join(documents), verbose=False)["input_ids"][:max_length]
                    states.append(last_states(model, torch.tensor([ids]))[0].mean(0).double().cpu())
                by_domain.append(torch.stack(states))
        return by_domain


def _pieces(domain: Domain, tokens: int) -> Tensor:
    """Return pieces of the held-out text of a domain with about `tokens` tokens, shape `(pieces, piece length)`."""
    samples = domain.probe_or_heldout
    length = min(PIECE, samples.shape[1])
    per_sample = samples.shape[1] // length
    pieces = samples[:, : per_sample * length].reshape(-1, length)
    return pieces[: max(tokens // length, 1)]
