"""Text in 30 languages, its cost in bits per byte or in tokens, and the scripts of tokens."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cache, lru_cache
from math import ceil, inf, log
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..arch.meta import positions_of
from ..domains.packing import tokenize_with_prefix
from ..forward.metrics import row_losses
from .tokens import Vocabulary


# Files with one line of text for each language. Languages are compared on the first file, which has the same text in
# all of them. Tokens are chosen by the second one.
SAME = "languages"
CHOOSING = "samples"
# A model knows a language if the text costs at most so many times the bits of its best language.
MAX_KNOWN_RATIO = 2.0
# The number of tokens on which the dense model is measured, all languages together.
MEASURED_TOKENS = 4096
# The number of characters in an opening.
OPENING_LENGTH = 16
SENTENCE_ENDS = re.compile(r"(?<=[.?!。？！।])\s*")


@cache
def texts(name: str = SAME) -> dict[str, str]:
    """Return the texts of a file by language code."""
    by_code = {}
    for line in Path(__file__).with_name(f"{name}.txt").read_text("utf-8").splitlines():
        if not line.startswith("#"):
            code, text = line.split(" ", 1)
            by_code[code] = text
    return by_code


def openings(codes: Iterable[str]) -> list[str]:
    """Return the first two words of each sentence in some languages; of Chinese, the first characters."""
    beginnings = []
    for code in codes:
        for sentence in SENTENCE_ENDS.split(texts(CHOOSING)[code]):
            if sentence:
                words = " ".join(sentence.split()[:2])
                beginnings.append(words[:OPENING_LENGTH])
    return beginnings


def tokens_by_language(tokenizer: PreTrainedTokenizerBase, name: str = SAME) -> dict[str, list[int]]:
    """Return the token ids of the text in each of 30 languages by its code, with the prefix of a text."""
    return {code: tokenize_with_prefix(text, tokenizer) for code, text in texts(name).items()}


def scripts_in(codes: Iterable[str]) -> set[str]:
    """Return the scripts of some languages."""
    scripts = set[str]()
    for code in codes:
        scripts.update(script(letter) for letter in texts()[code])
    return scripts


def samples_of(tokenizer: PreTrainedTokenizerBase, codes: Sequence[str], longest: int) -> torch.Tensor:
    """Return the sample text of languages in rows of at most `longest` tokens, shape `(rows, tokens)`."""
    by_code = tokens_by_language(tokenizer, CHOOSING)
    ids = torch.tensor([token for code in codes for token in by_code[code]])
    rows = ceil(len(ids) / longest)
    return ids[: len(ids) // rows * rows].view(rows, -1)


def cost_by_language(
    model: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    codes: Collection[str],
    max_tokens: float = inf,
) -> dict[str, float]:
    """Return the bits per byte of text by language, or its number of tokens if `model` is None.

    Languages are measured in the order of `codes`, on at most `max_tokens` tokens in all. Text that is longer than the
    positions of the model is left out.
    """
    ids_by_code = tokens_by_language(tokenizer)
    if model is None:
        return {code: len(ids_by_code[code]) for code in codes}

    costs: dict[str, float] = {}
    tokens = 0
    for code in codes:
        ids = ids_by_code[code]
        tokens += len(ids)
        if len(ids) <= positions_of(model) and tokens <= max_tokens:
            nats = float(row_losses(model, [torch.tensor(ids)]).sum())
            costs[code] = nats / log(2) / len(texts()[code].encode())
    return costs


def costs_before(
    model: PreTrainedModel | None, tokenizer: PreTrainedTokenizerBase, wanted: Collection[str]
) -> dict[str, dict[str, Any]]:
    """Measure the dense model by language: the languages to keep, then others, those with few tokens first."""
    lengths = {code: len(ids) for code, ids in tokens_by_language(tokenizer).items()}
    codes = sorted(lengths, key=lambda code: (code not in wanted, lengths[code]))
    max_tokens = max(MEASURED_TOKENS, sum(lengths[code] for code in wanted))
    costs = cost_by_language(model, tokenizer, codes, max_tokens)

    languages = {}
    known_codes = None if model is None else known(costs)
    for code, cost in costs.items():
        figures: dict[str, Any] = {"before": cost, "wanted": code in wanted}
        if known_codes is not None:
            figures["known"] = code in known_codes
        languages[code] = figures
    return languages


def with_costs_after(
    languages: Mapping[str, Mapping[str, Any]], model: PreTrainedModel | None, tokenizer: PreTrainedTokenizerBase
) -> dict[str, dict[str, Any]]:
    """Add the costs of the smaller model, in the languages to keep and those that the dense model knew."""
    codes = [code for code, figures in languages.items() if figures["wanted"] or figures.get("known", True)]
    costs = cost_by_language(model, tokenizer, codes)
    return {code: {**figures, "after": costs.get(code)} for code, figures in languages.items()}


def known(bits: Mapping[str, float]) -> set[str]:
    """Return the languages whose text costs at most `MAX_KNOWN_RATIO` times the bits of the best language.

    `bits` are the bits per byte by language. The languages have the same text, so that its total bits are compared.
    """
    totals = {code: per_byte * len(texts()[code].encode()) for code, per_byte in bits.items()}
    limit = MAX_KNOWN_RATIO * min(totals.values())
    return {code for code, total in totals.items() if total <= limit}


def scripts_of(vocabulary: Vocabulary, tokens: Iterable[int]) -> Counter[str]:
    """Count tokens by script, without the tokens that have no letter."""
    scripts = Counter(script(vocabulary.surface(token)) for token in tokens)
    del scripts[""]
    return scripts


def script(text: str) -> str:
    """Return the script of the first letter, mark or digit of a text, such as "LATIN" or "CJK", else ""."""
    for character in text:
        name = _script_of(character)
        if name:
            return name
    return ""


@lru_cache(None)
def _script_of(character: str) -> str:
    """Return the first word of the Unicode name of a letter, mark or digit, else ""."""
    if not character.isalpha() and unicodedata.category(character) not in ("Mn", "Mc", "Nd"):
        return ""
    name = unicodedata.name(character, "").partition(" ")[0]
    # Characters with these names belong to all scripts.
    return "" if name in ("COMBINING", "DIGIT", "VARIATION") else name
