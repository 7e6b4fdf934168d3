"""Choose the tokens of a smaller vocabulary: the required tokens, and then the most frequent tokens."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..arch.load import ModelInfo
from ..arch.modules import PROMPTS, module_files
from ..arch.spec import VOCAB, ArchSpec, Widths
from ..arch.token_space import counted_from, named_ids
from ..config.pruning import FILE, StructPruneConfig
from ..domains.languages import script, scripts_in
from ..domains.load import builtin_domains
from ..domains.manifest import Entry
from ..domains.packing import Domain
from ..domains.sources import resolve
from ..system.errors import StructPruneError
from ..system.stages import progress, say
from .amount import VocabBudget
from .count import MOST_COUNTED, has_words, language_shares, note_missing_words, shares_of, text_shares
from .tokens import Vocabulary, with_dependencies


# The total of the prior, relative to the counted text. Counts of rare tokens are unreliable.
PRIOR_WEIGHT = 0.3
# The total of the prior if words of languages are counted. A tokenizer for many languages says less than these words.
PRIOR_WEIGHT_WITH_WORDS = 0.02
# The total of the prior over scripts that occur in no text. Only letters of these scripts have a share of it.
PRIOR_WEIGHT_OF_OTHER_SCRIPTS = 0.001
# The weight of the model's predictions on the counted text. They include words that the text does not contain.
EXPECTED_WEIGHT = 0.3
# Letters with a smaller share of the text of languages are letters of foreign words.
FOREIGN_LETTER_SHARE = 1e-6
# A script with a smaller share of the text is only the script of a name.
MIN_SCRIPT_SHARE = 1e-4

# The reasons to keep a token, as reports name them. Their first letters differ.
REQUIRED = "always"
TEXT = "text"
LANGUAGE = "language"
DEPENDENCY = "needed"
PRIOR = "usual"


@dataclass(frozen=True)
class VocabularyRequest:
    """The tokens that a model may lose.

    Args:
        config: The config of the run.
        vocabulary: The tokens of the tokenizer.
        rows: The number of rows of the embedding.
        required: The ids that are always kept. They include ids of the tokenizer beyond the rows, and rows that only a
            config names.
        number: The number of rows to keep. None if tokens share a budget with other spaces, so that text decides.
        budget: The budget, if the config has one.
    """

    config: StructPruneConfig
    vocabulary: Vocabulary
    rows: int
    required: frozenset[int]
    number: int | None
    budget: VocabBudget | None = None

    @classmethod
    def of(
        cls, config: StructPruneConfig, described: ModelInfo, tokenizer: PreTrainedTokenizerBase, widths: Widths
    ) -> VocabularyRequest:
        """Return the request of a config.

        Raises:
            StructPruneError: If the number of tokens is too small for the model, or the budget cannot be met.
        """
        model = described.plain_model
        vocabulary = Vocabulary.of(tokenizer)
        rows = described.arch.of(VOCAB)[0].size
        padding = counted_from(model)

        named_tokens = _named_tokens(config, described, tokenizer, vocabulary, rows)
        # The model counts positions from the id of the padding, so no lower id may be removed.
        below_padding = set(range(padding)) - named_tokens
        ids = set(range(max(rows, vocabulary.size)))
        required = with_dependencies(named_tokens.union(below_padding), vocabulary.dependencies) & ids

        number = cast("int", widths[VOCAB])
        request = cls(config, vocabulary, rows, frozenset(required), number)
        if config.budget is not None:
            budget = VocabBudget.of(config, described.arch, model, request.allowed)
            if budget.is_shared:
                return replace(request, budget=budget, number=None)
            return replace(request, budget=budget)

        if number not in request.allowed:
            reason = ""
            if below_padding:
                reason = f", since it counts positions from the id of its padding, {padding}"
            raise StructPruneError(
                f"vocab={number:,} is not possible for this model: {request.allowed.start:,} of {rows:,} tokens are "
                f"always kept{reason}."
            )
        return request

    def ranked(self, order: Sequence[int], arch: ArchSpec, model: PreTrainedModel) -> VocabularyRequest:
        """Return the request after text has ranked the tokens, which determines the size of a smaller tokenizer."""
        if FILE not in (self.config.budget or {}):
            return self

        budget = VocabBudget.of(self.config, arch, model, self.allowed, order)
        number = self.number
        if number is not None:
            number = budget.largest({})
        return replace(self, budget=budget, number=number)

    @property
    def allowed(self) -> range:
        """Return the numbers of rows that the model can keep."""
        return range(len(self.required) - self._num_rowless, self.rows + 1)

    def order(self, scores: Tensor) -> list[int]:
        """Rank all ids: required tokens first, then by falling score. `scores` has the shape `(size,)`.

        Every token comes after the tokens that it is formed from, so that the order can be cut anywhere.
        """
        by_score = torch.argsort(scores, descending=True, stable=True).tolist()
        order: dict[int, None] = {}
        for token in sorted(self.required) + by_score:
            self._append_with_parts(order, token)

        # Rows without a token come last.
        for row in range(self.vocabulary.size, self.rows):
            order.setdefault(row)
        return list(order)

    def _append_with_parts(self, order: dict[int, None], token: int) -> None:
        """Append a token to an order, after the tokens that it is formed from."""
        stack = [token]
        while stack:
            missing = [part for part in self.vocabulary.dependencies(stack[-1]) if part not in order]
            if missing:
                stack += missing
            else:
                order.setdefault(stack.pop())

    def keep(self, order: Sequence[int], number: int) -> tuple[int, ...]:
        """Return the first ids of an order, ascending, so that `number` of them have rows."""
        return tuple(sorted(order[: number + self._num_rowless]))

    @property
    def _num_rowless(self) -> int:
        """Return the number of tokens without rows in the model. They have the largest ids."""
        return max(self.vocabulary.size - self.rows, 0)


def _named_tokens(
    config: StructPruneConfig,
    described: ModelInfo,
    tokenizer: PreTrainedTokenizerBase,
    vocabulary: Vocabulary,
    rows: int,
) -> set[int]:
    """Return the ids that the tokenizer, the model, the languages or the user name."""
    model = described.plain_model
    tokens = set(range(rows, vocabulary.size))
    tokens.update(vocabulary.fixed)
    tokens.update(named_ids(model))
    tokens.update(_letters(config.languages, vocabulary))

    prompts = json.loads(module_files(model.config).get(PROMPTS, "{}")).get("prompts") or {}
    for prompt in prompts.values():
        tokens.update(tokenizer(prompt)["input_ids"])

    if config.keep_tokens is not None:
        tokens.update(_tokens_of_user(config.keep_tokens, vocabulary))
    return tokens


def _letters(codes: Sequence[str] | None, vocabulary: Vocabulary) -> frozenset[int]:
    """Return the letters of the scripts of languages, Latin letters and symbols. Without languages, all letters."""
    if codes is None:
        return vocabulary.letters

    note_missing_words()
    scripts = scripts_in(codes)
    scripts.update(("", "LATIN"))
    return frozenset(token for token in vocabulary.letters if script(vocabulary.surface(token)) in scripts)


def _tokens_of_user(keep_tokens: str, vocabulary: Vocabulary) -> set[int]:
    """Return the tokens in the lines of a file, or all tokens that a regular expression matches."""
    path = os.path.expanduser(keep_tokens)
    try:
        if os.path.isfile(path):  # a regular expression may be longer than any file name
            tokens = _tokens_in_file(path, vocabulary)
        else:
            tokens = {token for token in range(vocabulary.size) if re.search(keep_tokens, vocabulary.surface(token))}
    except (OSError, ValueError, re.error) as error:
        raise StructPruneError(
            f"keep_tokens={keep_tokens!r} is neither a file in UTF-8 nor a regular expression: {error}"
        ) from error

    if not tokens:
        raise StructPruneError(
            f"keep_tokens={keep_tokens!r} names no token, neither as a file nor as a regular expression."
        )
    return tokens


def _tokens_in_file(path: str, vocabulary: Vocabulary) -> set[int]:
    """Return the tokens in a file whose lines are tokens or texts."""
    lines = [line for line in Path(path).read_text("utf-8-sig").split("\n") if line]
    if not lines:
        return set()

    tokenizer = vocabulary.tokenizer
    ids = tokenizer.get_vocab()
    tokens = {ids[line] for line in lines if line in ids}

    # A word has one spelling at the beginning of a text, and another spelling after a space.
    texts = lines + [f" {line}" for line in lines]
    for spelling in tokenizer(texts, add_special_tokens=False)["input_ids"]:
        tokens.update(spelling)
    return tokens


@dataclass(frozen=True)
class TokenShares:
    """The expected share of each token by the reason to keep it, all of shape `(size,)` and fp64.

    Args:
        text: The share in the counted text.
        languages: The share in the words of the languages to keep.
        prior: The share that the tokenizer and the model expect in other text.
        letters: 1 for the letters of the scripts that occur in text, and 0 for other tokens.
    """

    text: Tensor
    languages: Tensor
    prior: Tensor
    letters: Tensor

    def total(self) -> Tensor:
        """Return the score of each token: the sum of all shares."""
        return self.text + self.languages + self.prior + self.letters


def token_shares(
    request: VocabularyRequest, domains: Sequence[Domain], held_out: Collection[str], expected: Tensor | None = None
) -> tuple[TokenShares, list[Entry]]:
    """Return the expected share of each token, and the records of the counted text.

    General text, the prior and the predictions of the model count only in scripts that occur in the named domains or
    in the languages.

    Args:
        request: The tokens that the model may lose.
        domains: The text, the named domains first.
        held_out: The hashes of documents that are not counted.
        expected: The shares that the model expects, shape `(rows,)`, or None to leave them out.
    """
    vocabulary = request.vocabulary
    codes = request.config.languages or ()
    # The text and every language have the same weight.
    language_weight = len(codes) / (1 + len(codes))
    text_weight = 1 - language_weight

    named_text, general_text, entries = _text_shares(request, domains, held_out)
    named_text = text_weight * named_text
    general_text = text_weight * general_text
    languages = language_weight * language_shares(codes, vocabulary.tokenizer, vocabulary.size)

    script_shares = _sum_by_script(vocabulary, named_text + languages)
    is_shown = script_shares >= MIN_SCRIPT_SHARE
    is_letter = torch.zeros(vocabulary.size, dtype=torch.bool)
    is_letter[list(vocabulary.letters)] = True

    prior = _prior_shares(vocabulary, codes, script_shares, is_shown, is_letter)
    if expected is not None:
        rows = min(vocabulary.size, len(expected))
        prior[:rows] += EXPECTED_WEIGHT * text_weight * expected[:rows] * is_shown[:rows]

    shares = TokenShares(
        text=named_text + general_text * is_shown,
        languages=languages,
        prior=prior,
        letters=_letter_shares(is_letter, is_shown, named_text, languages),
    )
    return shares, entries


def _text_shares(
    request: VocabularyRequest, domains: Sequence[Domain], held_out: Collection[str]
) -> tuple[Tensor, Tensor, list[Entry]]:
    """Return the shares in the named and in the general text, shape `(size,)` each, and the records of both.

    share(token) = Σ over domains of weight(domain) · count(token, domain) / count(domain)
    """
    config = request.config
    vocabulary = request.vocabulary
    num_named = len(resolve(config.domains or builtin_domains()))
    max_tokens = MOST_COUNTED // len(domains)

    named_text = torch.zeros(vocabulary.size, dtype=torch.float64)
    general_text = torch.zeros(vocabulary.size, dtype=torch.float64)
    entries = []
    for index, domain in enumerate(progress(domains, desc="Counting tokens", unit="domain", leave=False)):
        shares, entry = text_shares(domain, config.seed, vocabulary.tokenizer, vocabulary.size, held_out, max_tokens)
        entries.append(entry)
        if index < num_named:
            named_text += domain.weight * shares
        else:
            general_text += domain.weight * shares

    return named_text, general_text, entries


def _prior_shares(
    vocabulary: Vocabulary, codes: Sequence[str], script_shares: Tensor, is_shown: Tensor, is_letter: Tensor
) -> Tensor:
    """Return the shares that the tokenizer expects in other text, shape `(size,)`.

    For tokens of the scripts that occur in text (`is_shown`), with q the prior of the tokenizer:

        share(token) = PRIOR_WEIGHT · q(token) · r(token) / Σ q r

    where r = 1 without languages. With languages, r(token) = share(script of the token) / Σ q over that script, so
    that every script has the weight that it has in text. `PRIOR_WEIGHT_OF_OTHER_SCRIPTS` is divided among the letters
    of other scripts in proportion to their prior.
    """
    tokenizer_prior = torch.tensor([vocabulary.prior(token) for token in range(vocabulary.size)], dtype=torch.float64)

    shares = tokenizer_prior * is_shown
    if codes:
        prior_of_scripts = _sum_by_script(vocabulary, tokenizer_prior).clamp_min(1e-38)
        shares = shares * (script_shares / prior_of_scripts)
    weight = PRIOR_WEIGHT
    if any(has_words(code) for code in codes):
        weight = PRIOR_WEIGHT_WITH_WORDS
    shares = shares * (weight / shares.sum())

    is_other_letter = is_letter & ~is_shown
    return shares + PRIOR_WEIGHT_OF_OTHER_SCRIPTS / tokenizer_prior.sum() * tokenizer_prior * is_other_letter


def _letter_shares(is_letter: Tensor, is_shown: Tensor, named_text: Tensor, languages: Tensor) -> Tensor:
    """Return 1 for each letter of a shown script, of the named text or of a language, else 0. Shape `(size,)`."""
    occurs = is_shown.logical_or(named_text > 0).logical_or(languages > FOREIGN_LETTER_SHARE)
    return is_letter.logical_and(occurs).double()


def _sum_by_script(vocabulary: Vocabulary, shares: Tensor) -> Tensor:
    """Return for each token the total share of its script, shape `(size,)`.

    Digits, spaces and punctuation belong to all scripts, and have the largest total.
    """
    names = [script(vocabulary.surface(token)) for token in range(vocabulary.size)]
    numbers = {"": 0}
    for name in names:
        numbers.setdefault(name, len(numbers))
    script_of_token = torch.tensor([numbers[name] for name in names])

    totals = torch.zeros(len(numbers), dtype=torch.float64).scatter_add(0, script_of_token, shares)
    totals[0] = totals.max()
    return totals[script_of_token]


@dataclass(frozen=True)
class Ranking:
    """All ids by their expected shares.

    Args:
        order: The ids. A smaller vocabulary keeps the first of them.
        shares: The shares of the tokens, which determine the order.
        removed_shares: The share of held-out tokens that is removed, by the number of kept rows, shape `(rows + 1,)`.
        entries: The records of the counted text.
    """

    order: list[int]
    shares: TokenShares
    removed_shares: Tensor
    entries: list[Entry]


def rank_tokens(
    request: VocabularyRequest, domains: Sequence[Domain], held_out: Collection[str], expected: Tensor | None
) -> Ranking:
    """Rank all tokens by their expected shares; see `token_shares` for the arguments."""
    shares, entries = token_shares(request, domains, held_out, expected)
    order = request.order(shares.total())
    return Ranking(order, shares, _removed_shares(request, order, domains), entries)


def _removed_shares(request: VocabularyRequest, order: Sequence[int], domains: Sequence[Domain]) -> Tensor:
    """Return the share of held-out tokens that is removed, by the number of kept rows, shape `(rows + 1,)`."""
    probabilities = torch.zeros(len(order), dtype=torch.float64)
    for domain in domains:
        probabilities += domain.weight * shares_of(domain.probe_or_heldout[:, 1:], len(order))

    # shares[n] = Σ of the probabilities of order[n:]
    shares = probabilities[torch.tensor(order)].flip(0).cumsum(0).flip(0)
    shares = torch.cat([shares, shares.new_zeros(1)])
    return shares[len(order) - request.rows :]


@dataclass(frozen=True)
class Choice:
    """A smaller vocabulary.

    Args:
        keep: The ids of the kept tokens, ascending.
        number: The number of kept tokens with rows. They come first.
        tokenizer: The tokenizer of the kept tokens.
        entries: The records of the counted text.
        scripts: The number of removed tokens by script.
        trimmed: The figures of the report.
    """

    keep: tuple[int, ...]
    number: int
    tokenizer: PreTrainedTokenizerFast
    entries: list[Entry]
    scripts: dict[str, int]
    trimmed: dict[str, Any]


def choose_tokens(request: VocabularyRequest, ranking: Ranking, number: int, domains: Sequence[Domain]) -> Choice:
    """Keep the first tokens of a ranking, `number` of them with rows, and check the smaller tokenizer on the domains.

    Raises:
        StructPruneError: If the smaller tokenizer reads text in another way than the tokenizer of the original model.
    """
    vocabulary = request.vocabulary
    keep = request.keep(ranking.order, number)
    say("Checking the smaller tokenizer …")
    smaller = vocabulary.smaller(keep)
    vocabulary.check(smaller, keep, _texts(vocabulary, domains))

    reasons = _reasons(keep[:number], request, ranking.shares)
    trimmed = {
        "tokens": request.rows - number,
        "respelled": float(ranking.removed_shares[number]),
        "reasons": dict(Counter(reasons)),
        "reason_of_each": "".join(reason[0] for reason in reasons),
        "unreadable": dict(scripts_of(vocabulary, vocabulary.letters.difference(keep))),
    }

    removed_tokens = set(range(vocabulary.size)).difference(keep)
    scripts = dict(scripts_of(vocabulary, removed_tokens))
    return Choice(keep, number, smaller, ranking.entries, scripts, trimmed)


def _texts(vocabulary: Vocabulary, domains: Sequence[Domain]) -> Iterator[str]:
    """Yield the text of the samples of domains."""
    for domain in domains:
        for ids in domain.samples:
            yield str(vocabulary.tokenizer.decode(ids))


def _reasons(keep: Sequence[int], request: VocabularyRequest, shares: TokenShares) -> list[str]:
    """Return the first reason that applies to each kept token."""
    prior = shares.prior.tolist()
    in_text = (shares.text > 0).tolist()
    in_languages = (shares.languages > 0).tolist()
    is_shown_letter = (shares.letters > 0).tolist()

    # A part is a dependency of a token that is expected more often.
    parts: set[int] = set()
    for token in keep:
        for part in request.vocabulary.dependencies(token):
            if prior[part] < prior[token]:
                parts.add(part)

    reasons = []
    for token in keep:
        if token in request.required:
            reason = REQUIRED
        elif token >= len(prior):  # a row without a token
            reason = DEPENDENCY
        elif is_shown_letter[token]:
            reason = REQUIRED
        elif in_text[token]:
            reason = TEXT
        elif in_languages[token]:
            reason = LANGUAGE
        elif token in parts or not prior[token]:
            reason = DEPENDENCY
        else:
            reason = PRIOR
        reasons.append(reason)
    return reasons


def scripts_of(vocabulary: Vocabulary, tokens: Iterable[int]) -> Counter[str]:
    """Count tokens by script. Tokens without letters are not counted."""
    scripts = Counter(script(vocabulary.surface(token)) for token in tokens)
    del scripts[""]
    return scripts
