"""Which tokens of a vocabulary stay: those that have to, and those whose absence would cost most."""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from heapq import heapify, heappop, heappush
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..arch.load import ModelInfo
from ..arch.spec import VOCAB, Widths
from ..arch.token_space import named_ids
from ..config.pruning import StructPruneConfig
from ..domains.packing import Domain
from ..domains.resolve import builtin_domains, resolve
from ..errors import StructPruneError
from ..forward.metrics import mean_probabilities
from ..widths.budget import check_fewest_tokens, large_vocabulary
from .languages import CHOOSING, script, tokens_by_language
from .tokens import Vocabulary, with_needs


logger = logging.getLogger(__name__)

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


def with_tokens(
    config: StructPruneConfig, described: ModelInfo, tokenizer: PreTrainedTokenizerBase | None = None
) -> StructPruneConfig:
    """The config with the tokens among its targets, where a budget names none and they are a large part of a model."""
    arch, model = described.arch, described.plain_model
    if not config.leaves_spaces_open or described.offloaded:
        return config
    if large_vocabulary(arch, model.num_parameters()) is None:
        return config
    try:
        if tokenizer is not None:
            Vocabulary.of(tokenizer)
    except StructPruneError as error:
        logger.info("No tokens go: %s", error)
        return config
    return replace(config, targets=(VOCAB, *(tuple(filter(arch.of, config.shrinking)) or arch.channels)))


@dataclass(frozen=True)
class Tokens:
    """The tokens of a model that is to have fewer: it has `rows` of weights, and `always` stay, among them those that
    only the tokenizer knows, and rows that only a config names. `number` of the rows are to stay; None where measured
    losses choose it.
    """

    vocabulary: Vocabulary
    rows: int
    always: frozenset[int]
    number: int | None

    @classmethod
    def of(
        cls,
        config: StructPruneConfig,
        described: ModelInfo,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        widths: Widths,
    ) -> Tokens:
        """The tokens of a dense model; a number that it cannot keep, or a budget that takes fewer, is refused."""
        assert tokenizer is not None  # `check` has refused that
        vocabulary, space = Vocabulary.of(tokenizer), described.arch.of(VOCAB)[0]
        competes = config.widths is None and len(widths) > 1
        ids = range(max(space.size, vocabulary.size))
        always = {*ids[space.size :], *vocabulary.always, *named_ids(model)}
        if config.keep_tokens is not None:
            always |= _kept_by_user(config.keep_tokens, tokenizer, vocabulary)
        always = with_needs(always, vocabulary.needs) & {*ids}
        tokens = cls(vocabulary, space.size, frozenset(always), None if competes else space.width_in(widths))
        may = tokens.may
        if config.budget is not None:
            check_fewest_tokens(config, described.arch, described.plain_model, may)
        elif tokens.number not in may:
            raise StructPruneError(
                f"vocab={tokens.number:,} is no number of tokens that this model can keep: {may.start:,} of "
                f"{may.stop - 1:,} always stay."
            )
        return tokens

    @property
    def beyond(self) -> int:
        """The number of tokens that the tokenizer names and that have no weights; their ids come after all others."""
        return max(self.vocabulary.size - self.rows, 0)

    @property
    def may(self) -> range:
        """The numbers of rows that the model can keep."""
        return range(len(self.always) - self.beyond, self.rows + 1)

    def keep(self, order: Sequence[int], number: int) -> tuple[int, ...]:
        """The ascending ids of tokens that stay, `number` with weights; rows without a token go before `order`."""
        padding = [row for row in range(self.vocabulary.size, self.rows) if row not in self.always]
        return keep_tokens(self.rows + self.beyond, [*padding[::-1], *order], number + self.beyond)


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


def keep_tokens(size: int, order: Sequence[int], number: int) -> tuple[int, ...]:
    """The ascending ids of `number` of `size` tokens, or all, once others have gone in a `removal_order`."""
    return tuple(sorted({*range(size)} - {*order[: max(size - number, 0)]}))


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
