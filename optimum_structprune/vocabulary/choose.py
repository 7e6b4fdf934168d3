"""Which tokens of a vocabulary stay: those that have to, and those whose absence would cost most."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..arch.load import ModelInfo
from ..arch.modules import PROMPTS, module_files
from ..arch.spec import VOCAB, Widths
from ..arch.token_space import counted_from, named_ids
from ..config.pruning import StructPruneConfig
from ..domains.load import builtin_domains
from ..domains.manifest import Entry
from ..domains.packing import Domain
from ..domains.sources import resolve
from ..errors import StructPruneError
from .amount import Room
from .count import MOST_COUNTED, has_words, language_shares, note_missing_words, shares_of, text_shares
from .languages import script, scripts_in, scripts_of
from .tokens import Vocabulary, with_dependencies


# The weight of what the tokenizer tells of other text beside what was counted: of rare tokens a count tells little.
# Where the words of languages are counted, they tell more than a tokenizer that has other languages of these scripts;
# text in scripts that nothing shows has a little weight, for its letters.
PRIOR, PRIOR_BESIDE_WORDS, PRIOR_OF_OTHER_SCRIPTS = 0.3, 0.02, 0.001
# The weight of what the model expects in the text that was counted, which tells other words of such text.
EXPECTED = 0.3
FOREIGN_LETTER_SHARE = 1e-6  # a letter with a smaller share of the text of languages is one of foreign words
# Of a script with a smaller share than this, the text shows no more than a name.
MIN_SCRIPT_SHARE = 1e-4
# Why a token stays: whatever the text is, in the text, in the languages, as a part of others, or in other text.
ALWAYS, TEXT, LANGUAGE, NEEDED, USUAL = "always", "text", "language", "needed", "usual"
# What a token of text loses on average, in nats, where it is spelled by others, and what layers lose that give up a
# share of themselves: a factor times a power of it. See examples/benchmarks/LOG.md.
RESPELLED_LOSS = 7.0
LAYERS_LOSS, LAYERS_POWER = 3.0, 1.25


@dataclass(frozen=True)
class VocabularyRequest:
    """The tokens of a model that is to have fewer.

    It has `rows` of weights. `required` are the tokens that stay, among them those that only the tokenizer knows, and
    rows that only a config names. `number` of the rows are to stay; None where text and the `room` in a budget say
    how many.
    """

    config: StructPruneConfig
    vocabulary: Vocabulary
    rows: int
    required: frozenset[int]
    number: int | None
    room: Room | None = None

    @classmethod
    def of(
        cls, config: StructPruneConfig, described: ModelInfo, tokenizer: PreTrainedTokenizerBase, widths: Widths
    ) -> VocabularyRequest:
        """Finds the required tokens, and refuses a number of tokens or a budget for fewer."""
        model = described.plain_model
        vocabulary, rows = Vocabulary.of(tokenizer), described.arch.of(VOCAB)[0].size
        ids = range(max(rows, vocabulary.size))
        required = {*ids[rows:], *vocabulary.fixed, *named_ids(model)}
        required |= _letters(config.languages, vocabulary)
        prompts = json.loads(module_files(model.config).get(PROMPTS, "{}")).get("prompts") or {}
        required |= {token for prompt in prompts.values() for token in tokenizer(prompt)["input_ids"]}
        if config.keep_tokens is not None:
            required |= _kept_by_user(config.keep_tokens, vocabulary)
        below = {*range(padding := counted_from(model))} - required  # the padding has to keep its id
        required = with_dependencies(required | below, vocabulary.dependencies) & {*ids}
        request = cls(config, vocabulary, rows, frozenset(required), cast("int", widths[VOCAB]))
        if config.budget is not None:
            room = Room.of(config, described.arch, described.plain_model, request.allowed)
            return replace(request, room=room, number=None if room.smallest else request.number)
        if request.number not in request.allowed:
            why = f", since it counts positions from the id of its padding, {padding}" if below else ""
            raise StructPruneError(
                f"vocab={request.number:,} is no number of tokens that this model can keep: "
                f"{request.allowed.start:,} of {rows:,} always stay{why}."
            )
        return request

    @property
    def allowed(self) -> range:
        """Gives the numbers of rows that the model can keep."""
        return range(len(self.required) - self._num_rowless, self.rows + 1)

    def order(self, scores: Tensor) -> list[int]:
        """Ranks all ids: those required first, then by falling score, shape `(size,)`.

        Each stands behind what it is formed from, so that what stays can be formed wherever the order is cut.
        """
        order = dict[int, None]()
        for token in [*sorted(self.required), *torch.argsort(scores, descending=True, stable=True).tolist()]:
            waiting = [token]
            while waiting:
                lacking = [part for part in self.vocabulary.dependencies(waiting[-1]) if part not in order]
                waiting += lacking
                if not lacking:
                    order[waiting.pop()] = None
        return [*order, *(row for row in range(self.vocabulary.size, self.rows) if row not in order)]

    def keep(self, order: Sequence[int], number: int) -> tuple[int, ...]:
        """Gives the ascending ids of the first tokens of an order, `number` of which have weights."""
        return tuple(sorted(order[: number + self._num_rowless]))

    @property
    def _num_rowless(self) -> int:
        """The number of tokens without rows in the model, whose ids come after all others."""
        return max(self.vocabulary.size - self.rows, 0)


@dataclass(frozen=True)
class Choice:
    """The ids of the kept tokens, ascending, `number` of them with weights; and what comes of the choice."""

    keep: tuple[int, ...]
    number: int
    tokenizer: PreTrainedTokenizerFast
    counted: list[Entry]
    scripts: dict[str, int]
    trimmed: dict[str, Any]


def choose_tokens(
    request: VocabularyRequest, domains: Sequence[Domain], held_out: Collection[str], expected: Tensor | None
) -> Choice | None:
    """Chooses the tokens that stay, and proves the smaller tokenizer on text; None if all tokens stay.

    All text of the domains is counted but for the documents that are `held_out`, by their hashes. `expected` are the
    shares that the model expects, of its rows.
    """
    vocabulary = request.vocabulary
    shares, counted = wanted_shares(request, domains, held_out, expected)
    order = request.order(sum(shares.values(), torch.zeros(vocabulary.size)))
    lost = _lost_shares(request, order, domains)
    number = number_within(request.room, lost) if request.number is None else request.number
    if number == request.rows:
        return None
    keep = request.keep(order, number)
    smaller = vocabulary.smaller(keep)
    texts = (str(vocabulary.tokenizer.decode(ids)) for domain in domains for ids in domain.samples)
    vocabulary.check(smaller, keep, texts)
    reasons = _reasons(keep[:number], request, shares)
    trimmed = {"tokens": request.rows - number, "respelled": float(lost[number]), "reasons": dict(Counter(reasons))}
    trimmed["reason_of_each"] = "".join(reason[0] for reason in reasons)
    trimmed["unreadable"] = dict(scripts_of(vocabulary, vocabulary.letters - {*keep}))
    scripts = scripts_of(vocabulary, {*range(vocabulary.size)} - {*keep})
    return Choice(keep, number, smaller, counted, dict(scripts), trimmed)


def number_within(room: Room | None, lost: Tensor) -> int:
    """Gives the number of tokens within a budget for which the expected loss is least.

    It is that of text whose tokens are gone, `lost` by the number that stays, and of what other spaces then give up.
    """
    assert room is not None
    fewest, most = room.largest({}), room.largest(room.smallest)
    numbers = [number for number in room.numbers if fewest <= number <= most] or [most]
    dense, limit = room.budget.cost({}), room.budget.limit
    of_tokens = (dense - room.budget.cost({VOCAB: numbers[0]})) / max(room.size - numbers[0], 1)

    def loss(number: int) -> float:
        share = (dense - (room.size - number) * of_tokens - limit) / (dense - room.size * of_tokens)
        return RESPELLED_LOSS * float(lost[number]) + LAYERS_LOSS * max(0.0, share) ** LAYERS_POWER

    # So few nats are not weighed against layers, which always lose some.
    return numbers[0] if loss(numbers[0]) < 2e-3 else min(numbers, key=loss)


def _lost_shares(request: VocabularyRequest, order: Sequence[int], domains: Sequence[Domain]) -> Tensor:
    """Gives the share of held-out tokens that go, by the number of kept rows, shape `(rows + 1,)`."""
    by_domain = [domain.weight * shares_of(domain.probe_or_heldout[:, 1:], len(order)) for domain in domains]
    lost = torch.stack(by_domain).sum(0)[torch.tensor(order)].flip(0).cumsum(0).flip(0)
    return torch.cat([lost, lost.new_zeros(1)])[len(order) - request.rows :]


def _reasons(keep: Sequence[int], request: VocabularyRequest, shares: Mapping[str, Tensor]) -> list[str]:
    usual, needs = shares[USUAL].tolist(), request.vocabulary.dependencies
    found = {token: NEEDED for token in keep} | {token: USUAL for token in keep if token < len(usual) and usual[token]}
    found |= {part: NEEDED for token in keep for part in needs(token) if usual[part] < usual[token]}
    for reason in (LANGUAGE, TEXT, ALWAYS):
        found |= dict.fromkeys(shares[reason].nonzero().flatten().tolist(), reason)
    found |= dict.fromkeys(request.required, ALWAYS)
    return [found[token] for token in keep]


def _letters(codes: Sequence[str] | None, vocabulary: Vocabulary) -> frozenset[int]:
    """Gives the letters of the scripts of languages, Latin ones, and symbols; all letters if none is named."""
    if codes is None:
        return vocabulary.letters
    note_missing_words()
    scripts = {"", "LATIN", *scripts_in(codes)}
    return frozenset(token for token in vocabulary.letters if script(vocabulary.surface(token)) in scripts)


def _kept_by_user(named: str, vocabulary: Vocabulary) -> set[int]:
    """Gives the tokens in the lines of a file, as tokens or text, or all matches of a regular expression."""
    path = os.path.expanduser(named)
    try:
        if os.path.isfile(path):  # an expression may be longer than a file system allows a name to be
            reader, lines = vocabulary.tokenizer, [*filter(None, Path(path).read_text("utf-8-sig").splitlines())]
            forms = [form for line in lines for form in (line, f" {line}")]  # as a text begins, and within one
            spelled, ids = reader(forms, add_special_tokens=False)["input_ids"] if forms else [], reader.get_vocab()
            kept = {token for row in spelled for token in row} | {ids[line] for line in lines if line in ids}
        else:
            kept = {token for token in range(vocabulary.size) if re.search(named, vocabulary.surface(token))}
    except (OSError, ValueError, re.error) as error:
        raise StructPruneError(
            f"keep_tokens={named!r} is neither a file in UTF-8 nor a regular expression: {error}"
        ) from error
    if not kept:
        raise StructPruneError(f"keep_tokens={named!r} names no token, neither as a file nor as a regular expression.")
    return kept


def wanted_shares(
    request: VocabularyRequest, domains: Sequence[Domain], held_out: Collection[str], expected: Tensor | None = None
) -> tuple[dict[str, Tensor], list[Entry]]:
    """Gives the share of each token by reason, shape `(size,)`, and the record of the counted text.

    Letters of the scripts that text shows have 1. General text behind the named domains, and other text, count in the
    scripts that these show or the languages; of other scripts, only letters do.
    """
    config, vocabulary, size = request.config, request.vocabulary, request.vocabulary.size
    most, named = MOST_COUNTED // len(domains), resolve(config.domains or builtin_domains())
    of_text, of_general = torch.zeros(2, size, dtype=torch.float64)
    entries = []
    for index, domain in enumerate(domains):
        shares, entry = text_shares(domain, config.seed, vocabulary.tokenizer, size, held_out, most)
        (of_text if index < len(named) else of_general).add_(domain.weight * shares)
        entries.append(entry)
    codes = config.languages or ()
    part = len(codes) / (1 + len(codes))  # each counts as much as the text
    of_languages = part * language_shares(codes, vocabulary.tokenizer, size)
    of_text, of_general = (1 - part) * of_text, (1 - part) * of_general
    by_script = _by_script(vocabulary, of_text + of_languages)
    shown = by_script >= MIN_SCRIPT_SHARE
    prior = torch.tensor([vocabulary.prior(token) for token in range(size)], dtype=torch.float64)
    letters = torch.zeros(size, dtype=torch.bool)
    letters[[*vocabulary.letters]] = True
    other = prior * shown * (by_script / _by_script(vocabulary, prior).clamp_min(1e-38) if codes else 1)
    other *= (PRIOR_BESIDE_WORDS if any(map(has_words, codes)) else PRIOR) / other.sum()
    if expected is not None:
        rows = min(size, len(expected))
        other[:rows] += EXPECTED * (1 - part) * expected[:rows] * shown[:rows]
    other += PRIOR_OF_OTHER_SCRIPTS / prior.sum() * prior * (letters & ~shown)
    needed = (letters & (shown | (of_text > 0) | (of_languages > FOREIGN_LETTER_SHARE))).double()
    return {TEXT: of_text + of_general * shown, LANGUAGE: of_languages, USUAL: other, ALWAYS: needed}, entries


def _by_script(vocabulary: Vocabulary, shares: Tensor) -> Tensor:
    # Digits, spaces and punctuation are of all scripts.
    scripts = [script(vocabulary.surface(token)) for token in range(vocabulary.size)]
    names = {name: index for index, name in enumerate(dict.fromkeys(["", *scripts]))}
    index = torch.tensor([names[name] for name in scripts])
    by_script = torch.zeros(len(names), dtype=torch.float64).scatter_add(0, index, shares)
    by_script[0] = by_script.max()
    return by_script[index]
