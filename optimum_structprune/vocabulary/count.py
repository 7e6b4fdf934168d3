"""Counts tokens: in the text of a run, in the words of languages, and when the tokenizer was made."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..config.domains import written_by_model
from ..domains.manifest import COUNTED, Entry
from ..domains.packing import Domain, tokenised
from ..domains.sources import documents
from .languages import CHOOSING, texts


logger = logging.getLogger(__name__)
# So many tokens of the text of all domains together are counted at most; no model reads them.
MOST_COUNTED = 4_000_000
MOST_WORDS = 100_000  # of a language, those that occur most
# What words stand behind, whether with a capital, and how often. In languages that write no spaces, words stand behind
# what is in no word; the parts of Korean ones are listed as words.
FORMS = ((" ", False, 0.6), (" ", True, 0.4))
OTHER_FORMS = {"ja": (("、", False, 1.0),), "zh": (("、", False, 1.0),), "ko": ((" ", False, 0.5), ("、", False, 0.5))}


def shares_of(ids: Tensor, size: int) -> Tensor:
    """Gives the share of each token in some ids, shape `(size,)`, float64."""
    counts = torch.bincount(ids.flatten(), minlength=size).double()
    return counts / counts.sum()


def text_shares(
    domain: Domain, seed: int, tokenizer: PreTrainedTokenizerBase, size: int, held_out: Collection[str], most: int
) -> tuple[Tensor, Entry]:
    """Counts the share of each token in the text of a domain but what is `held_out`, and gives its record."""
    if domain.origin is None or written_by_model(domain.origin):
        return shares_of(domain.samples, size), Entry.of(domain, COUNTED)
    counts, names, tokens = Counter[int](), dict[str, None](), 0
    for document in tokenised(documents(domain.origin, seed, tokenizer), tokenizer):
        if document.hash not in held_out:
            counts.update(document.ids)
            names[document.hash] = None
            tokens += len(document.ids)
        if tokens >= most:
            break
    shares = torch.tensor([counts[token] for token in range(size)], dtype=torch.float64) / max(tokens, 1)
    return shares, replace(Entry.of(domain, COUNTED), calibration_tokens=tokens, documents=[*names])


def language_shares(codes: Sequence[str], tokenizer: PreTrainedTokenizerBase, size: int) -> Tensor:
    """Gives the share of each token in languages, which count alike, shape `(size,)`, float64."""
    shares = torch.zeros(size, dtype=torch.float64)
    for code in codes:
        pairs = [*_lines(code)]
        rows = tokenizer([text for text, _ in pairs], add_special_tokens=False, verbose=False)["input_ids"]
        ids = torch.tensor([token for row in rows for token in row])
        each = torch.tensor([weight for _, weight in pairs], dtype=torch.float64)
        counts = torch.bincount(ids, each.repeat_interleave(torch.tensor([*map(len, rows)])), size)
        shares += counts / counts.sum() / len(codes)
    return shares


@cache
def note_missing_words() -> None:
    """Log once where there are no lists of words to count, and so only a few sentences of each language."""
    if find_spec("wordfreq") is None:
        logger.warning(
            "languages counts the words of the package wordfreq, which is not installed, and so only a few sentences "
            "of each: pip install 'optimum-structprune[languages]'"
        )


def has_words(code: str) -> bool:
    """Is true if there is a list of the words of a language."""
    if find_spec("wordfreq") is None:
        return False
    from wordfreq import available_languages

    return code in available_languages()


@cache
def _lines(code: str) -> Sequence[tuple[str, float]]:
    """Lists texts of a language with their frequencies: words in each form, or sample sentences."""
    if not has_words(code):
        return [(texts(CHOOSING)[code], 1.0)]
    from wordfreq import get_frequency_list

    lines, count = [], 0
    for hundredths, listed in enumerate(get_frequency_list(code)):  # all words of a frequency
        words = [*_unfolded(listed, code)]
        for between, capital, share in OTHER_FORMS.get(code, FORMS):
            text = between.join(["", *(word[:1].upper() + word[1:] if capital else word for word in words)])
            lines.append((text, share * 10.0 ** (-hundredths / 100)))
        count += len(words)
        if count >= MOST_WORDS:
            break
    return lines


def _unfolded(words: Sequence[str], code: str) -> Iterator[str]:
    # In the lists, German words have no ß and Greek ones no final sigma.
    for word in words:
        yield word[:-1] + "ς" if code == "el" and word.endswith("σ") else word
        if code == "de" and "ss" in word:
            yield word.replace("ss", "ß")
