"""Sample text in 30 languages, and the scripts of tokens."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from functools import cache, lru_cache
from math import ceil
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from .packing import tokenize_with_prefix


# Files with one line of text for each language. The first file has the same text in all languages, to compare them.
# The second file is for the choice of tokens.
SAME = "languages"
CHOOSING = "samples"
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
