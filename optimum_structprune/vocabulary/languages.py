"""What a smaller vocabulary means for languages and scripts."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from .tokens import Vocabulary


SENTENCES = Path(__file__).with_name("languages.txt")
BREAK = "|"  # between words where the language writes no space


def tokens_per_word(tokenizer: PreTrainedTokenizerBase) -> dict[str, float]:
    """How many tokens a word takes in a sentence of each of 30 languages, by the language's code."""
    lines = [line.split(" ", 1) for line in SENTENCES.read_text("utf-8").splitlines() if not line.startswith("#")]
    texts = [text.replace(BREAK, "") for _, text in lines]
    rows = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    words = [len(text.split(BREAK if BREAK in text else None)) for _, text in lines]
    return {code: len(ids) / count for (code, _), ids, count in zip(lines, rows, words, strict=True)}


def scripts_of(vocabulary: Vocabulary, tokens: Iterable[int]) -> Counter[str]:
    """How many of some tokens are of each script; those without a letter are of none."""
    scripts = Counter(script(vocabulary.surface(token)) for token in tokens)
    del scripts[""]
    return scripts


def script(text: str) -> str:
    """The script of the first letter of a text, as Unicode names it ("LATIN", "CJK"); empty where it has no letter."""
    return next((_script_of(letter) for letter in text if letter.isalpha()), "")


@lru_cache(None)
def _script_of(letter: str) -> str:
    return unicodedata.name(letter, "").partition(" ")[0]
