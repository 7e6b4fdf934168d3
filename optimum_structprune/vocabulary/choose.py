"""Which tokens of a vocabulary stay: those that have to, and those whose absence would cost most."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from heapq import heapify, heappop, heappush
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..arch.load import ModelInfo
from ..arch.spec import VOCAB, Widths
from ..arch.token_space import counted_from, named_ids
from ..config.pruning import StructPruneConfig
from ..domains.packing import Domain
from ..domains.resolve import builtin_domains, resolve
from ..errors import StructPruneError
from ..forward.metrics import mean_probabilities
from .amount import Room
from .languages import CHOOSING, script, scripts_of, tokens_by_language
from .tokens import Vocabulary, with_needs


# The weight of what is expected of other text against what was counted: of rare tokens a count tells little.
GUESSED = 3.0
# A token's number tells how often it occurred when the vocabulary was made; the first so many count alike.
ALIKE = 1000
# Of a script with a smaller share than this, the text shows no more than a name.
NEVER = 1e-4
# The part of the weight of the domains that samples of the languages to keep have, where a config names some.
LANGUAGES_SHARE = 0.5
# The number of tokens that the model reads to tell what it expects, in all domains together.
ENOUGH = 8192
# What a token of text loses on average, in nats, where it is spelled by others, and what layers lose that give up a
# share of themselves: a factor times a power of it. See examples/benchmarks/LOG.md.
RESPELLED_LOSS = 7.0
LAYERS_LOSS, LAYERS_POWER = 3.0, 1.25
# Tokens that lose fewer nats than this are not weighed against layers, which always lose some.
FREE = 2e-3


@dataclass(frozen=True)
class VocabularyRequest:
    """The tokens of a model that is to have fewer: it has `rows` of weights, and `always` stay, among them those that
    only the tokenizer knows, and rows that only a config names. `number` of the rows are to stay; None where text and
    the `room` in a budget say how many.
    """

    vocabulary: Vocabulary
    rows: int
    always: frozenset[int]
    number: int | None
    room: Room | None = None

    @classmethod
    def of(
        cls,
        config: StructPruneConfig,
        described: ModelInfo,
        tokenizer: PreTrainedTokenizerBase,
        widths: Widths,
    ) -> VocabularyRequest:
        """The tokens of a dense model; a number that it cannot keep, or a budget that takes fewer, is refused."""
        model = described.plain_model
        vocabulary, rows = Vocabulary.of(tokenizer), described.arch.of(VOCAB)[0].size
        ids = range(max(rows, vocabulary.size))
        always = {*ids[rows:], *vocabulary.always, *named_ids(model)}
        if config.keep_tokens is not None:
            always |= _kept_by_user(config.keep_tokens, tokenizer, vocabulary)
        below = {*range(padding := counted_from(model))} - always  # the padding has to keep its id
        always = with_needs(always | below, vocabulary.needs) & {*ids}
        request = cls(vocabulary, rows, frozenset(always), cast("int", widths[VOCAB]))
        if config.budget is not None:
            room = Room.of(config, described.arch, described.plain_model, request.may)
            return replace(request, room=room, number=None if room.smallest else request.number)
        if request.number not in request.may:
            why = f", since it counts positions from the id of its padding, {padding}" if below else ""
            raise StructPruneError(
                f"vocab={request.number:,} is no number of tokens that this model can keep: {request.may.start:,} of "
                f"{rows:,} always stay{why}."
            )
        return request

    @property
    def may(self) -> range:
        """The numbers of rows that the model can keep."""
        return range(len(self.always) - self._beyond, self.rows + 1)

    def keep(self, order: Sequence[int], number: int) -> tuple[int, ...]:
        """The ascending ids of tokens that stay, `number` with weights; rows without a token go before `order`."""
        return tuple(sorted({*range(self.rows + self._beyond)} - {*self.removed(order)[: self.rows - number]}))

    def removed(self, order: Sequence[int]) -> list[int]:
        """The order in which rows go: those without a token first."""
        padding = [row for row in range(self.vocabulary.size, self.rows) if row not in self.always]
        return [*padding[::-1], *order]

    @property
    def _beyond(self) -> int:
        """The number of tokens that the tokenizer names and that have no weights; their ids come after all others."""
        return max(self.vocabulary.size - self.rows, 0)


@dataclass(frozen=True)
class Choice:
    """The tokens that stay, as ascending ids of which the first `number` have weights, the tokenizer that has no
    others, and by how many of the others are of each script.
    """

    keep: tuple[int, ...]
    number: int
    tokenizer: PreTrainedTokenizerFast
    scripts: dict[str, int]
    trimmed: dict[str, float]


def choose_tokens(
    request: VocabularyRequest,
    config: StructPruneConfig,
    reader: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    domains: Sequence[Domain],
) -> Choice | None:
    """The tokens that stay of a model, with the tokenizer that is left, proved on all text; None if all stay."""
    vocabulary = request.vocabulary
    shares, predicted = wanted_shares(reader, config, domains, tokenizer, vocabulary)
    order = removal_order(vocabulary, shares, request.always, predicted)
    lost = _lost_shares(request, order, domains)
    number = request.number
    if number is None:
        number = number_within(cast("Room", request.room), lost)
    if number == request.rows:
        return None
    keep = request.keep(order, number)
    smaller = vocabulary.smaller(keep)
    texts = (str(tokenizer.decode(ids)) for domain in domains for ids in domain.pool)
    vocabulary.check(smaller, keep, texts)
    gone = {*range(vocabulary.size)} - {*keep}
    trimmed = {"tokens": request.rows - number, "respelled": float(lost[request.rows - number])}
    return Choice(keep, number, smaller, dict(scripts_of(vocabulary, gone)), trimmed)


def number_within(room: Room, lost: Tensor) -> int:
    """The number of tokens of the least expected loss within a budget: of text whose tokens are gone, `lost` by how
    many go, and of what the other spaces then give up.
    """
    most, fewest = room.largest(room.smallest), room.largest({})
    numbers = [number for number in room.numbers if fewest <= number <= most] or [most]
    size = room.size
    budget = room.budget
    dense, with_fewest = budget.cost({}), budget.cost({VOCAB: numbers[0]})
    each = (dense - with_fewest) / max(size - numbers[0], 1)

    def loss(number: int) -> float:
        tokens = RESPELLED_LOSS * float(lost[size - number])
        share = max(0.0, dense - (size - number) * each - budget.limit) / (dense - size * each)
        return tokens + LAYERS_LOSS * share**LAYERS_POWER

    if loss(numbers[0]) < FREE:
        return numbers[0]
    return min(numbers, key=lambda number: (loss(number), -number))


def _lost_shares(request: VocabularyRequest, order: Sequence[int], domains: Sequence[Domain]) -> Tensor:
    """The share of held-out text whose tokens are gone, by the number of rows that go, shape `(rows + 1,)`."""
    size = request.rows + request._beyond
    shares = torch.zeros(size, dtype=torch.float64)
    for domain in domains:
        counts = torch.bincount(domain.trial[:, 1:].flatten(), minlength=size)
        shares += domain.weight * counts / counts.sum()
    gone = shares[request.removed(order)].cumsum(0)
    return torch.cat([gone.new_zeros(1), gone])


def _lines(path: str) -> list[str]:
    try:
        lines = [line for line in Path(path).read_text(encoding="utf-8-sig").splitlines() if line]
    except (OSError, ValueError) as error:
        raise StructPruneError(f"keep_tokens={path!r} cannot be read as UTF-8: {error}") from error
    if not lines:
        raise StructPruneError(f"keep_tokens={path!r} is empty; write a token or a text in each line.")
    return lines


def _kept_by_user(named: str, tokenizer: PreTrainedTokenizerBase, vocabulary: Vocabulary) -> set[int]:
    path = os.path.expanduser(named)
    if os.path.isfile(path):  # an expression may be longer than a file system allows a name to be
        ids, lines = tokenizer.get_vocab(), _lines(path)
        # Within a text, a word begins with its space.
        spelled = tokenizer([form for line in lines for form in (line, f" {line}")], add_special_tokens=False)
        return {token for of in spelled["input_ids"] for token in of} | {ids[line] for line in lines if line in ids}
    try:
        kept = {token for token in range(vocabulary.size) if re.search(named, vocabulary.surface(token))}
    except re.error as error:
        raise StructPruneError(f"keep_tokens={named!r} is no file and no regular expression: {error}") from error
    if not kept:
        raise StructPruneError(f"keep_tokens={named!r} is no file, and as a regular expression fits no token.")
    return kept


def wanted_shares(
    reader: PreTrainedModel | None,
    config: StructPruneConfig,
    domains: Sequence[Domain],
    tokenizer: PreTrainedTokenizerBase,
    vocabulary: Vocabulary,
) -> tuple[Tensor, Tensor | None]:
    """The shares of tokens in text, and those that the `reader` expects, a causal model if there is one, shape
    `(size,)`. Of the general text behind the named domains, tokens of the scripts count that these show, or samples of
    the languages to keep.
    """
    own, size = domains[: len(resolve(config.domains or builtin_domains()))], vocabulary.size
    named, general = (
        [token_shares(text, size), *([] if reader is None else [predicted_shares(reader, text, size)])]
        for text in (_with_languages(own, config.languages or (), tokenizer), domains[len(own) :])
    )
    shown = _by_script(vocabulary, named[0]) >= NEVER
    shares, *predicted = (of_named + shown * of_general for of_named, of_general in zip(named, general, strict=True))
    return shares, predicted[0] if predicted else None


def _with_languages(
    domains: Sequence[Domain], languages: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> list[Domain]:
    """Domains, and samples of languages with a part of their weight."""
    share = LANGUAGES_SHARE if languages else 0.0
    weight = sum(domain.weight for domain in domains)
    rows = tokens_by_language(tokenizer, CHOOSING) if languages else {}
    samples = {code: torch.tensor([rows[code]]) for code in languages}
    return [
        *(replace(domain, weight=(1 - share) * domain.weight) for domain in domains),
        *(Domain(code, share * weight / len(samples), ids, ids[:0]) for code, ids in samples.items()),
    ]


def token_shares(domains: Sequence[Domain], size: int) -> Tensor:
    """The share of each token in the calibration text, domains by their weights, shape `(size,)`, float64."""
    shares = torch.zeros(size, dtype=torch.float64)
    for domain in domains:
        counts = torch.bincount(domain.pool.flatten(), minlength=size)
        shares += domain.weight * counts / counts.sum()
    return shares


def predicted_shares(model: PreTrainedModel, domains: Sequence[Domain], size: int) -> Tensor:
    """The share of each token that a causal model expects in the text, by domain weights, shape `(size,)`, float64."""
    shares = torch.zeros(size, dtype=torch.float64)
    for domain in domains:
        count = max(1, round(ENOUGH * domain.weight / domain.samples.shape[1]))
        of_rows = mean_probabilities(model, domain.samples[:count])[:size]  # of more or fewer tokens than there are
        shares[: len(of_rows)] += domain.weight * of_rows
    return shares


def removal_order(
    vocabulary: Vocabulary, shares: Tensor, always: Collection[int] = (), predicted: Tensor | None = None
) -> list[int]:
    """The ids of all tokens that may go, those first whose absence costs least, so that what stays can still be formed
    wherever the removal ends. `shares` are those of the tokens in text, and `predicted` those that a causal model
    expects, shape `(size,)`; `always` stay, beside those of the vocabulary.
    """
    tokens = range(vocabulary.size)
    needs = [vocabulary.needs(token) for token in tokens]
    fixed = with_needs({*vocabulary.always, *always}, vocabulary.needs)
    parts, read = [vocabulary.parts(token) for token in tokens], _expected(vocabulary, shares, predicted).tolist()
    wholes = Counter(part for of in needs for part in set(of))

    def entry(token: int) -> tuple[float, int]:
        # Each further token that it is spelled by costs about as much, whatever it is. What has no parts and may go
        # is never read, if there is a token of that id at all.
        return (read[token] * max(1, len(parts[token]) - 1) if parts[token] else -1.0), -token

    heap = [entry(token) for token in tokens if not wholes[token] and token not in fixed]
    heapify(heap)
    kept, order = set(tokens), list[int]()
    while heap:
        cost, token = heappop(heap)
        if (now := entry(-token))[0] > cost:  # it has taken the place of another since
            heappush(heap, now)
            continue
        kept.remove(-token)
        order.append(-token)
        for part in _spelled(parts[-token], parts, kept):
            read[part] += read[-token]
        for part in set(needs[-token]):
            wholes[part] -= 1
            if not wholes[part] and part not in fixed:
                heappush(heap, entry(part))
    return order


def _spelled(waiting: Sequence[int], parts: Sequence[Sequence[int]], kept: Collection[int]) -> list[int]:
    """The tokens of `kept` that take the place of tokens."""
    return [end for part in waiting for end in ([part] if part in kept else _spelled(parts[part], parts, kept))]


def _expected(vocabulary: Vocabulary, shares: Tensor, predicted: Tensor | None) -> Tensor:
    """The share of each token expected in text of all kinds, shape `(size,)`: what was counted, and a guess."""
    evidence = (shares if predicted is None else predicted).double()
    number = torch.arange(vocabulary.size, dtype=torch.float64) + ALIKE
    guess = number**-1 if predicted is None else evidence**0.5 * number**-0.75
    guess = guess * _by_script(vocabulary, evidence) ** 0.5
    return shares.double() + GUESSED * guess / guess.sum()


def _by_script(vocabulary: Vocabulary, shares: Tensor) -> Tensor:
    """The share of the script of each token; digits, spaces and punctuation are of all scripts."""
    scripts = [script(vocabulary.surface(token)) for token in range(vocabulary.size)]
    names = {name: index for index, name in enumerate(dict.fromkeys(["", *scripts]))}
    index = torch.tensor([names[name] for name in scripts])
    by_script = torch.zeros(len(names), dtype=torch.float64).scatter_add(0, index, shares)
    by_script[0] = by_script.max()
    return by_script[index]
