"""Languages and scripts: text in 30 languages, and its cost in bits per byte or tokens."""

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


# The files of text, a line for each language: the same text, on which languages are compared, and other text.
SAME, CHOOSING = "languages", "samples"
MAX_KNOWN_RATIO = 2.0  # times the bits of a model's best language, in which it reads a text of one that it knows


@cache
def texts(name: str = SAME) -> dict[str, str]:
    """Reads the texts of a file by language code: the same text in each of 30 languages, or `CHOOSING`."""
    lines = Path(__file__).with_name(f"{name}.txt").read_text("utf-8").splitlines()
    return dict(line.split(" ", 1) for line in lines if not line.startswith("#"))


def openings(codes: Iterable[str]) -> list[str]:
    """Gives the first two words of each sentence in some languages; of Chinese, the first signs."""
    sentences = [part for code in codes for part in re.split(r"(?<=[.?!。？！।])\s*", texts(CHOOSING)[code]) if part]
    return [" ".join(sentence.split()[:2])[:16] for sentence in sentences]


def tokens_by_language(tokenizer: PreTrainedTokenizerBase, name: str = SAME) -> dict[str, list[int]]:
    """Gives the tokens of the text in each of 30 languages, by their codes, with the prefix."""
    return {code: tokenize_with_prefix(text, tokenizer) for code, text in texts(name).items()}


def scripts_in(codes: Iterable[str]) -> set[str]:
    """Gives the scripts of some languages."""
    return {script(letter) for code in codes for letter in texts()[code]}


def samples_of(tokenizer: PreTrainedTokenizerBase, codes: Sequence[str], longest: int) -> torch.Tensor:
    """Gives the sample text of languages in rows of at most `longest` tokens, shape `(rows, tokens)`."""
    by_code = tokens_by_language(tokenizer, CHOOSING)
    ids = torch.tensor([token for code in codes for token in by_code[code]])
    rows = ceil(len(ids) / longest)
    return ids[: len(ids) // rows * rows].view(rows, -1)


def cost_by_language(
    model: PreTrainedModel | None, tokenizer: PreTrainedTokenizerBase, codes: Collection[str], most: float = inf
) -> dict[str, float]:
    """Measures bits per byte of text in languages, `most` tokens in all; without a model, counts tokens."""
    rows, read = tokens_by_language(tokenizer), 0
    if model is None:
        return {code: len(rows[code]) for code in codes}
    costs = dict[str, float]()
    for code in codes:
        read += len(rows[code])
        if len(rows[code]) <= positions_of(model) and read <= most:
            loss = float(row_losses(model, [torch.tensor(rows[code])]).sum())
            costs[code] = loss / log(2) / len(texts()[code].encode())
    return costs


def costs_before(
    model: PreTrainedModel | None, tokenizer: PreTrainedTokenizerBase, wanted: Collection[str]
) -> dict[str, dict[str, Any]]:
    """Measures the dense model by language: wanted ones, then those of few tokens up to 4,096 tokens in all."""
    rows = tokens_by_language(tokenizer)
    codes = sorted(rows, key=lambda code: (code not in wanted, len(rows[code])))
    costs = cost_by_language(model, tokenizer, codes, most=max(4096, sum(len(rows[code]) for code in wanted)))
    knows = None if model is None else known(costs)
    return {
        code: {"before": cost, "wanted": code in wanted, **({} if knows is None else {"known": code in knows})}
        for code, cost in costs.items()
    }


def with_costs_after(
    languages: Mapping[str, Mapping[str, Any]], model: PreTrainedModel | None, tokenizer: PreTrainedTokenizerBase
) -> dict[str, dict[str, Any]]:
    """Adds the costs of the smaller model, for languages to keep and those that the dense one knew."""
    codes = [code for code, costs in languages.items() if costs["wanted"] or costs.get("known", True)]
    after = cost_by_language(model, tokenizer, codes)
    return {code: {**costs, "after": after.get(code)} for code, costs in languages.items()}


def known(bits: Mapping[str, float]) -> set[str]:
    """Gives the languages with at most `MAX_KNOWN_RATIO` times the bits of the best one."""
    of_text = {code: per_byte * len(texts()[code].encode()) for code, per_byte in bits.items()}
    return {code for code, cost in of_text.items() if cost <= MAX_KNOWN_RATIO * min(of_text.values())}


def scripts_of(vocabulary: Vocabulary, tokens: Iterable[int]) -> Counter[str]:
    """Counts tokens by script; those without a letter are of none."""
    scripts = Counter(script(vocabulary.surface(token)) for token in tokens)
    del scripts[""]
    return scripts


def script(text: str) -> str:
    """Names the script of the first letter, mark or digit of a text, as Unicode does ("LATIN", "CJK")."""
    return next(filter(None, map(_script_of, text)), "")


@lru_cache(None)
def _script_of(character: str) -> str:
    is_of_one = character.isalpha() or unicodedata.category(character) in ("Mn", "Mc", "Nd")
    name = unicodedata.name(character, "").partition(" ")[0] if is_of_one else ""
    return name if name not in ("COMBINING", "DIGIT", "VARIATION") else ""  # which are of all scripts
