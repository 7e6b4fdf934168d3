"""Divide a budget between tokens and the layers by losses that are measured on held-out text."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import copy, deepcopy
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..arch.inference import last_states
from ..arch.load import describe
from ..arch.meta import positions_of, shrunk_skeleton
from ..arch.spec import MODEL, VOCAB, Widths
from ..domains.packing import Domain, Passages
from ..forward.metrics import evaluating, row_losses
from ..method.loop import prune_layers_
from ..method.shrink import Masks
from ..sources.data import source_of
from ..system.processes import broadcast_object
from ..system.stages import progress, say
from ..vocabulary.amount import without_tokens
from ..vocabulary.choose import Ranking, VocabularyRequest
from ..widths.allocation import widths_of
from .base import RunState
from .resize import drop_tokens_


# The numbers of tokens that a trial is calibrated and measured on.
CALIBRATION_TOKENS = 8192
MEASURED_TOKENS = 8192
# The number of tokens in a piece of held-out text.
PIECE = 64
# The number of tokens of short texts that run together.
BATCH_TOKENS = 512


@dataclass(frozen=True)
class Trial:
    """A measured division of the budget.

    Args:
        number: The number of kept tokens.
        of_tokens: The loss with fewer tokens and dense layers.
        total: The loss with fewer tokens and pruned layers.
    """

    number: int
    of_tokens: float
    total: float


def divide_budget(state: RunState, request: VocabularyRequest, ranking: Ranking) -> int:
    """Return the number of tokens to keep where tokens and units inside the layers share a budget.

    The budget is met by tokens alone first, if that is possible. The second division removes half as large a share of
    the held-out tokens, and prunes the layers for the rest of the budget. If the second has the smaller loss, so that
    layers have a part, a third one is where the loss is least at the prices that the second one has measured. The
    division with the least measured loss is taken.

    Whole layers and whole experts are not pruned on trial. Tokens then have as large a part as they can.
    """
    assert request.budget is not None
    candidates = request.budget.candidates
    removed_shares = ranking.removed_shares
    first = candidates[0]
    alone_is_free = float(removed_shares[first]) == 0 and request.budget.is_met_by({VOCAB: first})
    if len(candidates) == 1 or alone_is_free or not _is_inside_layers(state, request.budget.smallest):
        return settled(state, request, first).number

    with evaluating(state.model):
        division = Division(state, request, ranking)
        trials = [division.trial(first)]
        goal = float(removed_shares[first]) / 2
        fewer_removed = [number for number in candidates[1:] if float(removed_shares[number]) <= goal]
        trials.append(division.trial(fewer_removed[0] if fewer_removed else candidates[-1]))
        if trials[1].total < trials[0].total:
            cheapest = settled(state, request, division.cheapest(trials[1]))
            if cheapest.number not in [trial.number for trial in trials]:
                trials.append(division.trial(cheapest.number))
    best = min(trials, key=lambda trial: trial.total)
    return best.number


def _is_inside_layers(state: RunState, names: Mapping[str, object]) -> bool:
    """Return whether all spaces consist of units inside the layers."""
    spaces = [state.arch.of(name)[0] for name in names]
    return all(space.inside and space.layer != MODEL for space in spaces)


class Share(NamedTuple):
    """The widths of a division: the number of tokens, and the widths of the other spaces, none if they are dense."""

    number: int
    others: Widths


def settled(state: RunState, request: VocabularyRequest, number: int) -> Share:
    """Return the widths of a division with about so many tokens.

    The other spaces take the largest widths that meet the budget. Their steps are coarser than the steps of tokens, so
    that more tokens may fit beside them.
    """
    assert request.budget is not None
    if request.budget.is_met_by({VOCAB: number}):
        return Share(number, {})

    config = without_tokens(state.config, request.budget.budget.limit)
    assert config is not None
    skeleton = shrunk_skeleton(state.model, state.arch, {VOCAB: number})
    arch = describe(skeleton, state.config.arch_file)
    others = widths_of(replace(config, allocation="uniform"), arch, skeleton)
    return Share(max(number, request.budget.largest(others)), others)


class Division:
    """Trials of divisions on the model of a run, which is dense again after each of them."""

    def __init__(self, state: RunState, request: VocabularyRequest, ranking: Ranking):
        self.state = state
        self.request = request
        self.ranking = ranking
        self.text = HeldOutText(state, request.vocabulary.tokenizer)

    def trial(self, number: int) -> Trial:
        """Measure a division with about so many tokens."""
        number, widths = settled(self.state, self.request, number)
        keep = self.request.keep(self.ranking.order, number)
        tokenizer = self.request.vocabulary.smaller(keep)
        smaller = copy_with_shared_weights(self.state.model)
        drop_tokens_(smaller, self.state.arch, keep)

        of_tokens = total = self.text.loss(smaller, tokenizer)
        if widths:
            with self._pruned(widths):
                total = self.text.loss(smaller, tokenizer)
        others = "".join(f", {name} {width}" for name, width in widths.items() if isinstance(width, int))
        say(f"trial: vocab {number:,}{others}: loss {total:.4f} ({of_tokens:.4f} by tokens alone)")
        return Trial(number, *broadcast_object((of_tokens, total)))

    def cheapest(self, trial: Trial) -> int:
        """Return the number of tokens with the least expected loss at the prices of a trial.

        The loss of tokens is proportional to the share of held-out tokens that is removed, and the loss of layers to
        their contribution to the budget:

            loss(n) = of_tokens · removed(n) / removed(trial) + (total - of_tokens) · excess(n) / excess(trial)

        where excess(n) is what a model with n tokens and dense layers has beyond the limit.
        """
        assert self.request.budget is not None
        candidates = self.request.budget.candidates
        removed = self.ranking.removed_shares[torch.tensor(candidates)]
        cost, limit = self.request.budget.budget.cost, self.request.budget.budget.limit
        ends = [cost({VOCAB: number}) - limit for number in (candidates[0], candidates[-1])]
        position = (torch.tensor(candidates) - candidates[0]) / (candidates[-1] - candidates[0])
        excess = (ends[0] + position.double() * (ends[1] - ends[0])).clamp(min=0)

        at = bisect_left(candidates, trial.number)
        price_of_tokens = trial.of_tokens / max(float(removed[at]), 1e-9)
        price_of_layers = (trial.total - trial.of_tokens) / max(float(excess[at]), 1.0)
        losses = price_of_tokens * removed + price_of_layers * excess
        return candidates[int(losses.argmin())]

    @contextmanager
    def _pruned(self, widths: Widths) -> Iterator[None]:
        """Prune the layers to some widths, on part of the calibration text, inside `with`."""
        state = self.state
        data = state.data.portion(CALIBRATION_TOKENS)
        masks = Masks(state.model, state.arch)
        source = source_of(state.model, state.arch, data.own_batches, data.config.feedback_share)
        layers = progress(range(state.arch.num_layers), desc="trial", unit="layer")
        try:
            prune_layers_(masks, source, data.method(state.model, state.arch), widths, layers=layers)
            yield
        finally:
            masks.undo_(partial(source.at, changes=True))


def copy_with_shared_weights(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy whose parameters share the memory of the model's."""
    return deepcopy(model, {id(parameter): copy(parameter) for parameter in model.parameters()})


class HeldOutText:
    """Held-out text by domain, which models with other tokenizers are compared on.

    The loss of a causal language model is the increase of its loss in nats per token of the dense model. The loss of
    another model is 1 less the cosine of its mean last hidden state to the dense model's, in the mean over pieces.
    """

    def __init__(self, state: RunState, tokenizer: PreTrainedTokenizerBase):
        self.data = state.data
        self.causal = state.arch.causal
        tokens = MEASURED_TOKENS // len(state.data.domains)
        self.pieces = [_pieces(domain, tokens) for domain in state.data.domains]
        self.passages = [Passages(list(pieces), tokenizer) for pieces in self.pieces]
        self.dense_losses = torch.zeros(len(self.passages))
        self.dense_states: list[Tensor] = []
        if self.causal:
            self.dense_losses = self._losses(state.model, tokenizer)
        else:
            self.dense_states = self._states(state.model, tokenizer)

    def loss(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> float:
        """Return the loss of a smaller model, in the mean over the domains."""
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
    """Return pieces of the held-out text of a domain, about so many tokens, shape `(pieces, tokens)`."""
    samples = domain.probe_or_heldout
    length = min(PIECE, samples.shape[1])
    per_sample = samples.shape[1] // length
    pieces = samples[:, : per_sample * length].reshape(-1, length)
    return pieces[: max(tokens // length, 1)]
