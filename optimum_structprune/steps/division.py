"""Divide a budget between tokens and layers by measured losses on held-out text."""

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

    The first trial meets the budget by tokens alone, if that is possible. The second trial removes half of that share
    of the held-out tokens, and prunes the layers for the remaining budget. If the second trial has the smaller loss, a
    third trial follows at the number of tokens with the smallest loss, predicted from the second trial. The result is
    the trial with the smallest measured loss.

    Trials do not prune whole layers or whole experts. In that case, as many tokens are removed as the budget needs.
    """
    assert request.budget is not None
    candidates = request.budget.candidates
    fewest = candidates[0]
    fewest_share = float(ranking.removed_shares[fewest])

    # Trials are not needed if the number is fixed, or if tokens that do not occur meet the budget.
    tokens_are_enough = fewest_share == 0 and request.budget.is_met_by({VOCAB: fewest})
    if len(candidates) == 1 or tokens_are_enough or not _is_inside_layers(state, request.budget.smallest):
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


def _is_inside_layers(state: RunState, names: Mapping[str, object]) -> bool:
    """Return whether all spaces consist of units inside the layers."""
    spaces = [state.arch.of(name)[0] for name in names]
    return all(space.inside and space.layer != MODEL for space in spaces)


class DivisionWidths(NamedTuple):
    """The widths of a division.

    Attributes:
        number: The number of tokens.
        layer_widths: The widths of the other spaces. Spaces that are not in it keep their full width.
    """

    number: int
    layer_widths: Widths


def division_widths(state: RunState, request: VocabularyRequest, number: int) -> DivisionWidths:
    """Return the widths of a division with `number` tokens or a few more.

    The other spaces get the largest widths that meet the budget. Their steps are coarser than the steps of tokens, so
    the budget may then allow a few more tokens.
    """
    assert request.budget is not None
    if request.budget.is_met_by({VOCAB: number}):
        return DivisionWidths(number, {})

    config = without_tokens(state.config, request.budget.budget.limit)
    assert config is not None
    skeleton = shrunk_skeleton(state.model, state.arch, {VOCAB: number})
    arch = describe(skeleton, state.config.arch_file)
    layer_widths = widths_of(replace(config, allocation="uniform"), arch, skeleton)

    number = max(number, request.budget.largest(layer_widths))
    return DivisionWidths(number, layer_widths)


class Division:
    """Trials of divisions on the model of a run. Each trial restores the dense model."""

    def __init__(self, state: RunState, request: VocabularyRequest, ranking: Ranking):
        self.state = state
        self.request = request
        self.ranking = ranking
        self.text = HeldOutText(state, request.vocabulary.tokenizer)

    def trial(self, number: int) -> Trial:
        """Measure a division with `number` tokens or a few more."""
        number, layer_widths = division_widths(self.state, self.request, number)
        keep = self.request.keep(self.ranking.order, number)
        tokenizer = self.request.vocabulary.smaller(keep)
        smaller = copy_with_shared_weights(self.state.model)
        drop_tokens_(smaller, self.state.arch, keep)

        token_loss = self.text.loss(smaller, tokenizer)
        total_loss = token_loss
        if layer_widths:
            # The copy shares its weights with the model, so it has the pruned layers too.
            with self._pruned(layer_widths):
                total_loss = self.text.loss(smaller, tokenizer)

        text = f"vocab {number:,}"
        for name, width in layer_widths.items():
            if isinstance(width, int):
                text += f", {name} {width}"
        say(f"trial: {text}: loss {total_loss:.4f} ({token_loss:.4f} by tokens alone)")

        token_loss, total_loss = broadcast_object((token_loss, total_loss))
        return Trial(number, token_loss, total_loss)

    def cheapest(self, trial: Trial) -> int:
        """Return the number of tokens with the smallest loss, predicted from a trial.

        The loss of tokens is proportional to the removed share of held-out tokens, and the loss of layers to their
        contribution to the budget:

            loss(n) = token_loss · removed(n) / removed(trial) + (total_loss - token_loss) · excess(n) / excess(trial)

        where excess(n) is the cost of a model with n tokens and dense layers, minus the limit.
        """
        assert self.request.budget is not None
        budget = self.request.budget.budget
        candidates = self.request.budget.candidates
        removed = self.ranking.removed_shares[torch.tensor(candidates)]

        # The cost is linear in the number of tokens.
        smallest_excess = budget.cost({VOCAB: candidates[0]}) - budget.limit
        largest_excess = budget.cost({VOCAB: candidates[-1]}) - budget.limit
        position = (torch.tensor(candidates) - candidates[0]) / (candidates[-1] - candidates[0])
        excess = smallest_excess + position.double() * (largest_excess - smallest_excess)
        excess = excess.clamp(min=0)

        index = bisect_left(candidates, trial.number)
        token_price = trial.token_loss / max(float(removed[index]), 1e-9)
        layer_price = (trial.total_loss - trial.token_loss) / max(float(excess[index]), 1.0)
        losses = token_price * removed + layer_price * excess
        return candidates[int(losses.argmin())]

    @contextmanager
    def _pruned(self, widths: Widths) -> Iterator[None]:
        """Prune the layers to some widths inside `with`, on a part of the calibration text."""
        state = self.state
        data = state.data.portion(CALIBRATION_TOKENS)

        masks = Masks(state.model, state.arch)
        source = source_of(state.model, state.arch, data.own_batches, data.config.feedback_share)
        layers = progress(range(state.arch.num_layers), desc="Pruning on trial", unit="layer")
        try:
            prune_layers_(masks, source, data.method(state.model, state.arch), widths, layers=layers)
            yield
        finally:
            masks.undo_(partial(source.at, changes=True))


def copy_with_shared_weights(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy of a model that shares the memory of the parameters."""
    return deepcopy(model, {id(parameter): copy(parameter) for parameter in model.parameters()})


class HeldOutText:
    """Held-out text by domain, to compare models with different tokenizers.

    The loss of a causal language model is the increase of its cross-entropy over the dense model, in nats per token of
    the dense model. The loss of another model is 1 - cos(h, h_dense), where h is its mean last hidden state over a
    piece of text, averaged over pieces.
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
        """Return the loss of a smaller model, averaged over the domains."""
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
                    state = last_states(model, torch.tensor([ids]))[0].mean(0)
                    states.append(state.double().cpu())
                by_domain.append(torch.stack(states))

        return by_domain


def _pieces(domain: Domain, tokens: int) -> Tensor:
    """Return pieces of the held-out text of a domain with about `tokens` tokens in all, shape `(pieces, length)`."""
    samples = domain.probe_or_heldout
    length = min(PIECE, samples.shape[1])
    pieces_per_sample = samples.shape[1] // length

    pieces = samples[:, : pieces_per_sample * length].reshape(-1, length)
    num_pieces = max(tokens // length, 1)
    return pieces[:num_pieces]
