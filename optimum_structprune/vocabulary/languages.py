"""Measure the cost of text in 30 languages, in bits per byte or in tokens, and find the scripts of tokens."""

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
from ..errors import warn
from ..forward.metrics import row_losses
from .tokens import Vocabulary


# Files with one line of text for each language. The first file has the same text in all languages, to compare them.
# The second file is for the choice of tokens.
SAME = "languages"
CHOOSING = "samples"
# A model knows a language if the text costs at most this many times the bits of its best language.
MAX_KNOWN_RATIO = 2.0
# The number of tokens in all languages together that measure the dense model.
MEASURED_TOKENS = 4096
# The part of the text in a language that is not to be kept. In a smaller vocabulary, the whole text would have up to
# ten times as many tokens.
OTHER_SHARE = 1 / 3
# The maximum number of characters in an opening.
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
    """Return the first two words of each sentence in some languages, cut to `OPENING_LENGTH` characters."""
    beginnings = []
    for code in codes:
        for sentence in SENTENCE_ENDS.split(texts(CHOOSING)[code]):
            if sentence:
                words = " ".join(sentence.split()[:2])
                beginnings.append(words[:OPENING_LENGTH])

    return beginnings


def tokens_by_language(tokenizer: PreTrainedTokenizerBase, name: str = SAME) -> dict[str, list[int]]:
    """Return the token ids of the text in each of 30 languages by its code, with the prefix of the tokenizer."""
    return {code: tokenize_with_prefix(text, tokenizer) for code, text in texts(name).items()}


def measured_texts(kept_codes: Collection[str]) -> dict[str, str]:
    """Return the text of each language by its code: all of it in the languages to keep, else its beginning."""
    measured = dict(texts())
    for code in measured.keys() - set(kept_codes):
        measured[code] = measured[code][: round(OTHER_SHARE * len(measured[code]))]
    return measured


def scripts_in(codes: Iterable[str]) -> set[str]:
    """Return the scripts of some languages."""
    scripts = set[str]()
    for code in codes:
        scripts.update(script(letter) for letter in texts()[code])
    return scripts


def samples_of(tokenizer: PreTrainedTokenizerBase, codes: Sequence[str], longest: int) -> torch.Tensor:
    """Return the sample text of languages in rows of at most `longest` tokens, shape `(rows, tokens)`."""
    by_code = tokens_by_language(tokenizer, CHOOSING)
    ids: list[int] = []
    for code in codes:
        ids += by_code[code]

    rows = ceil(len(ids) / longest)
    row_length = len(ids) // rows
    return torch.tensor(ids[: rows * row_length]).view(rows, row_length)


def cost_by_language(
    model: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    codes: Collection[str],
    kept_codes: Collection[str],
    max_tokens: float = inf,
) -> dict[str, float]:
    """Return the bits per byte of text by language, or its number of tokens if `model` is None.

    Languages are measured in the order of `codes`, on at most `max_tokens` tokens in all. Text that is longer than the
    positions of the model is skipped.
    """
    if model is None:
        ids_by_code = tokens_by_language(tokenizer)
        return {code: len(ids_by_code[code]) for code in codes}

    costs: dict[str, float] = {}
    tokens = 0
    measured = measured_texts(kept_codes)
    for code in codes:
        ids = tokenize_with_prefix(measured[code], tokenizer)
        tokens += len(ids)

        if len(ids) <= positions_of(model) and tokens <= max_tokens:
            nats = float(row_losses(model, [torch.tensor(ids)]).sum())
            costs[code] = nats / log(2) / len(measured[code].encode())

    return costs


def costs_before(
    model: PreTrainedModel | None, tokenizer: PreTrainedTokenizerBase, codes: Collection[str]
) -> dict[str, dict[str, Any]]:
    """Measure the dense model by language.

    The languages to keep come first. The other languages follow by their number of tokens, up to `MEASURED_TOKENS`. No
    language is measured if all texts are longer than the positions of the model.

    Args:
        model: The dense model, or None to count tokens instead.
        tokenizer: Its tokenizer.
        codes: The codes of the languages to keep.
    """
    lengths = {code: len(ids) for code, ids in tokens_by_language(tokenizer).items()}
    order = sorted(lengths, key=lambda code: (code not in codes, lengths[code]))
    max_tokens = max(MEASURED_TOKENS, sum(lengths[code] for code in codes))
    costs = cost_by_language(model, tokenizer, order, codes, max_tokens)

    skipped = sorted(set(codes) - set(costs))
    if skipped and model is not None:
        warn(
            f"The sample text of {', '.join(skipped)} has more tokens than the model has positions "
            f"({positions_of(model):.0f}), so the model is not measured in these languages."
        )

    languages = {}
    for code, cost in costs.items():
        languages[code] = {"before": cost, "wanted": code in codes}

    if model is not None:
        known_codes = known_languages(costs)
        for code, figures in languages.items():
            figures["known"] = code in known_codes
    return languages


def with_costs_after(
    languages: Mapping[str, Mapping[str, Any]], model: PreTrainedModel | None, tokenizer: PreTrainedTokenizerBase
) -> dict[str, dict[str, Any]]:
    """Add the costs of the smaller model in the languages to keep and the languages that the dense model knows."""
    codes = [code for code, figures in languages.items() if figures["wanted"] or figures.get("known", True)]
    kept_codes = [code for code in codes if languages[code]["wanted"]]
    costs = cost_by_language(model, tokenizer, codes, kept_codes)

    with_costs = {}
    for code, figures in languages.items():
        with_costs[code] = dict(figures, after=costs.get(code))
    return with_costs


def known_languages(bits: Mapping[str, float]) -> set[str]:
    """Return the languages whose text costs at most `MAX_KNOWN_RATIO` times the bits of the best language.

    `bits` are the bits per byte by language. All languages have the same text, so the total bits are compared. If none
    was measured, none is known.
    """
    if not bits:
        return set()

    totals = {code: per_byte * len(texts()[code].encode()) for code, per_byte in bits.items()}
    limit = MAX_KNOWN_RATIO * min(totals.values())

    return {code for code, total in totals.items() if total <= limit}


def scripts_of(vocabulary: Vocabulary, tokens: Iterable[int]) -> Counter[str]:
    """Count tokens by script. Tokens without letters are not counted."""
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
    if name in ("COMBINING", "DIGIT", "VARIATION"):
        return ""
    return name
