"""Choose the shape of a budget that tokens and other spaces share: several kinds of shapes compete in trials."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache

from transformers import PreTrainedTokenizerBase

from ..arch.inference import evaluating
from ..arch.spec import MODEL, VOCAB, Widths
from ..config.pruning import FILE, StructPruneConfig
from ..saving.file_size import bytes_by_type
from ..steps.base import RunState
from ..steps.temporary import DIVISION_TOKENS
from ..system.stages import say
from ..vocabulary.amount import VocabBudget, without_tokens
from ..vocabulary.choose import Ranking, VocabularyRequest
from ..widths.allocation import widths_of
from ..widths.budget import UnreachableBudgetError
from .trials import Candidate, Keep, SeveralTexts, Trials, record_shapes


# The KV groups compete too if the config names no targets. They are the only units inside the layers that are never
# pruned by default, and in some models they cost less than channels.
ALSO_BY_DEFAULT = "attention"
# The number of data types in which pruned models compete, and the divisions that are tried in each.
MOST_TYPES = 2
SHARES_OF_TYPES = (0.0, 0.5)
# The number of smaller tokenizers in memory. One takes seconds to make.
MOST_TOKENIZERS = 4
# The distances to the best division at which further divisions are tried, as shares of the numbers of tokens. A
# search for the width of each layer tries more divisions too.
DISTANCES = {"uniform": (0.25,), "sensitivity": (0.25, 0.125)}


@dataclass(frozen=True)
class Kind:
    """Shapes that remove tokens and units of the same other spaces.

    Args:
        state: The state of the run.
        config: The config, whose targets are the tokens and the other spaces.
        budget: The budget that the spaces share.
        keep: A function from a number of tokens to the kept tokens and their tokenizer.
    """

    state: RunState
    config: StructPruneConfig
    budget: VocabBudget
    keep: Keep

    def widths(self, share: float) -> Widths:
        """Return the widths of a division of the budget. All tokens are kept if the widths do not name them.

        Args:
            share: 0 for the fewest tokens, which meet the budget alone if possible, and 1 for the most tokens. The
                other spaces have the largest widths that meet the budget. The steps of these widths are coarse, so
                the budget may leave room for some further tokens.
        """
        candidates = self.budget.candidates
        number = candidates[round(share * (len(candidates) - 1))]
        if self.budget.is_met_by({VOCAB: number}):
            return {VOCAB: number}

        config = without_tokens(self.config)
        assert config is not None
        budget = self.budget.budget.after({VOCAB: number})
        config = replace(config, allocation="uniform")
        widths = widths_of(config, self.state.arch, self.state.model, budget=budget)

        number = max(number, self.budget.largest(widths))
        if number >= self.budget.rows:
            return widths
        return {VOCAB: number} | dict(widths)


def choose_widths(state: RunState, request: VocabularyRequest, ranking: Ranking, any_kind: bool = False) -> Widths:
    """Return the widths of the shape with the smallest loss in a trial, and record all shapes in the report.

    Tokens alone, the other targets alone and divisions between both compete. Each shape meets the budget. The first
    divisions are the two ends and the middle, followed by the two neighbours of the best division.

    Whole layers, experts and hidden channels are not pruned in trials. In this case, as many tokens as possible are
    removed.

    Args:
        state: The state of the run.
        request: The tokens that the model may lose.
        ranking: The order of the tokens.
        any_kind: Whether KV groups compete, although the config does not target them.
    """
    assert request.budget is not None
    keep = _kept_tokens(request, ranking)
    kind = Kind(state, request.config, request.budget, keep)
    candidates = request.budget.candidates

    # Trials are not needed if the number is fixed, or if tokens that do not occur in the text meet the budget.
    costs_nothing = float(ranking.removed_shares[candidates[0]]) == 0 and request.budget.is_met_by(kind.widths(0.0))
    is_inside = all(_is_inside_layers(state, name) for name in request.budget.smallest)
    if len(candidates) == 1 or costs_nothing or not is_inside:
        return kind.widths(0.0)

    with evaluating(state.model), state.report.timed("search"):
        tournament = Tournament(state, request.vocabulary.tokenizer, keep)
        tournament.try_divisions(kind)
        if any_kind and state.arch.of(ALSO_BY_DEFAULT) and ALSO_BY_DEFAULT not in request.budget.smallest:
            config = replace(request.config, targets=(VOCAB, ALSO_BY_DEFAULT))
            # A small budget may need other spaces.
            with suppress(UnreachableBudgetError):
                budget = VocabBudget.of(config, state.arch, state.model, request.allowed, ranking.order)
                tournament.trial(Kind(state, config, budget, keep), 0.5)
        return tournament.best().widths


def choose_format(state: RunState, request: VocabularyRequest | None = None, ranking: Ranking | None = None) -> Widths:
    """Return the widths of the best file within a budget, set its data type in the config, and record all trials.

    The original model in the largest data type that meets the budget competes with pruned models in the two next
    larger types. All losses are measured after quantization.

    Args:
        state: The state of the run, whose config has the smallest type in which the original model is too large.
        request: The tokens that the model may lose, or None to keep all.
        ranking: The order of the tokens.
    """
    config = state.config
    limit = (config.budget or {})[FILE]
    sizes = bytes_by_type(config, state.arch, state.model)
    fitting = [kind for kind, size in sizes.items() if size <= limit]
    larger = [kind for kind, size in sizes.items() if size > limit][:MOST_TYPES]

    keep = None
    if request is not None and ranking is not None:
        keep = _kept_tokens(request, ranking)

    with evaluating(state.model), state.report.timed("search"):
        assert state.tokenizer is not None
        tournament = Tournament(state, state.tokenizer, keep)
        if fitting:
            tournament.measure({}, fitting[-1])

        for kind in larger:
            # A much larger type may need other spaces.
            with suppress(UnreachableBudgetError):
                typed_config = replace(config, gguf=kind)
                if keep is None or request is None or ranking is None:
                    widths = widths_of(replace(typed_config, allocation="uniform"), state.arch, state.model)
                    tournament.measure(widths, kind)
                    continue

                typed_request = replace(request, config=replace(request.config, gguf=kind))
                typed_request = typed_request.ranked(ranking.order, state.arch, state.model)
                assert typed_request.budget is not None
                for share in SHARES_OF_TYPES:
                    tournament.trial(Kind(state, typed_request.config, typed_request.budget, keep), share)

        best = tournament.best()

    state.data = replace(state.data, config=replace(config, gguf=best.gguf))
    return best.widths


def _kept_tokens(request: VocabularyRequest, ranking: Ranking) -> Keep:
    """Return a function from a number of tokens to the kept tokens and their tokenizer."""

    @lru_cache(MOST_TOKENIZERS)
    def keep(number: int) -> tuple[Sequence[int], PreTrainedTokenizerBase]:
        kept = request.keep(ranking.order, number)
        return kept, request.vocabulary.smaller(kept)

    return keep


def _is_inside_layers(state: RunState, name: str) -> bool:
    """Return whether a space consists of units inside the layers."""
    space = state.arch.of(name)[0]
    return space.inside and space.layer != MODEL


class Tournament:
    """The trials of a search for the shape with the smallest loss."""

    def __init__(self, state: RunState, tokenizer: PreTrainedTokenizerBase, keep: Keep | None):
        self.state = state
        self.trials = Trials(state, SeveralTexts(state, tokenizer), DIVISION_TOKENS, keep)
        self.candidates: list[Candidate] = []
        self.losses: list[float] = []

    def try_divisions(self, kind: Kind) -> None:
        """Measure divisions: the two ends and the middle, and then the neighbours of the best division."""
        losses = {share: self.trial(kind, share) for share in (0.0, 0.5, 1.0)}
        for distance in DISTANCES[kind.config.allocation]:
            best = min(losses, key=lambda share: losses[share])
            for share in (best - distance, best + distance):
                if 0 <= share <= 1:
                    losses[share] = self.trial(kind, share)

    def trial(self, kind: Kind, share: float) -> float:
        """Return the loss of a division, which is measured only once."""
        gguf = None
        if FILE in (kind.config.budget or {}):
            gguf = kind.config.gguf
        return self.measure(kind.widths(share), gguf)

    def measure(self, widths: Widths, gguf: str | None) -> float:
        """Return the loss of a shape with weights in a data type of GGUF, which is measured only once."""
        for candidate, loss in zip(self.candidates, self.losses, strict=True):
            if candidate.widths == widths and candidate.gguf == gguf:
                return loss

        name = " and ".join(widths) or "the original model"
        if gguf is not None:
            name = f"{gguf.upper()}, {name}"
        loss = self.trials.loss(widths, gguf)
        shape = ", ".join(f"{kind} {width:,}" for kind, width in widths.items() if isinstance(width, int))
        say(f"trial: {name} {shape}: loss {loss:.4f}")
        self.candidates.append(Candidate(name, widths, gguf=gguf))
        self.losses.append(loss)
        return loss

    def best(self) -> Candidate:
        """Return the shape with the smallest loss, and record all shapes in the report."""
        return record_shapes(self.state.report, self.candidates, self.losses)
