"""Count tokens in the text of a run and in the words of languages."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from itertools import chain

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..config.domains import written_by_model
from ..domains.languages import CHOOSING, texts
from ..domains.manifest import COUNTED, Entry
from ..domains.packing import Domain, tokenised
from ..domains.sources import documents
from ..system.stages import progress


logger = logging.getLogger(__name__)
# The maximum number of tokens to count in the text of all domains together. No model reads them.
MOST_COUNTED = 4_000_000
MOST_WORDS = 100_000  # the maximum number of words to count per language, the most frequent words first
# The contexts of counted words: the text before each word, whether words are capitalized, and the weight. In languages
# without spaces, a comma precedes words. The list of Korean words also contains parts of words.
FORMS = ((" ", False, 0.6), (" ", True, 0.4))
OTHER_FORMS = {"ja": (("、", False, 1.0),), "zh": (("、", False, 1.0),), "ko": ((" ", False, 0.5), ("、", False, 0.5))}


def shares_of(ids: Tensor, size: int) -> Tensor:
    """Return the share of each token among some ids, shape `(size,)`, in fp64."""
    counts = torch.bincount(ids.flatten(), minlength=size).double()
    return counts / counts.sum()


def text_shares(
    domain: Domain,
    seed: int,
    tokenizer: PreTrainedTokenizerBase,
    size: int,
    held_out: Collection[str],
    max_tokens: int,
) -> tuple[Tensor, Entry]:
    """Count the tokens in the text of a domain.

    Args:
        domain: The domain. If the model wrote its text, only its samples are counted.
        seed: The seed of the order of documents.
        tokenizer: The tokenizer.
        size: The number of ids.
        held_out: The hashes of the documents that are not counted.
        max_tokens: The number of tokens after which counting ends.

    Returns:
        The share of each token, shape `(size,)`, in fp64, and the entry of the manifest for the counted text.
    """
    if domain.origin is None or written_by_model(domain.origin):
        return shares_of(domain.samples, size), Entry.of(domain, COUNTED)

    counts: Counter[int] = Counter()
    hashes: dict[str, None] = {}
    tokens = 0
    for document in tokenised(documents(domain.origin, seed, tokenizer), tokenizer):
        if document.hash not in held_out:
            counts.update(document.ids)
            hashes[document.hash] = None
            tokens += len(document.ids)
        if tokens >= max_tokens:
            break

    shares = torch.tensor([counts[token] for token in range(size)], dtype=torch.float64) / max(tokens, 1)
    entry = replace(Entry.of(domain, COUNTED), calibration_tokens=tokens, documents=list(hashes))
    return shares, entry


def language_shares(codes: Sequence[str], tokenizer: PreTrainedTokenizerBase, size: int) -> Tensor:
    """Return the share of each token in languages of equal weight, shape `(size,)`, in fp64."""
    shares = torch.zeros(size, dtype=torch.float64)
    for code in progress(codes, desc="Counting words", unit="language", leave=False):
        lines = _lines(code)
        rows = tokenizer([text for text, _ in lines], add_special_tokens=False, verbose=False)["input_ids"]
        ids = torch.tensor(list(chain.from_iterable(rows)))

        # Each token has the frequency of its line.
        lengths = torch.tensor([len(row) for row in rows])
        frequencies = torch.tensor([frequency for _, frequency in lines], dtype=torch.float64)
        counts = torch.bincount(ids, frequencies.repeat_interleave(lengths), size)
        shares += counts / counts.sum() / len(codes)
    return shares


@cache
def note_missing_words() -> None:
    """Log once that word lists are missing, so that only a few sentences of each language are counted."""
    if find_spec("wordfreq") is None:
        logger.warning(
            "The package wordfreq is not installed, so `languages` counts only a few sentences of each language. "
            "Install it: pip install 'optimum-structprune[languages]'"
        )


def has_words(code: str) -> bool:
    """Return whether wordfreq has a word list of a language."""
    if find_spec("wordfreq") is None:
        return False

    from wordfreq import available_languages

    return code in available_languages()


@cache
def _lines(code: str) -> Sequence[tuple[str, float]]:
    """Return texts of a language with their frequencies: its words in each form, or sample sentences."""
    if not has_words(code):
        return [(texts(CHOOSING)[code], 1.0)]

    from wordfreq import get_frequency_list

    lines: list[tuple[str, float]] = []
    count = 0
    # The words are grouped by frequency, in steps of a hundredth of its logarithm.
    for hundredths, group in enumerate(get_frequency_list(code)):
        words = list(_unfolded(group, code))
        frequency = 10.0 ** (-hundredths / 100)

        for prefix, is_capitalized, weight in OTHER_FORMS.get(code, FORMS):
            forms = words
            if is_capitalized:
                forms = [word[:1].upper() + word[1:] for word in words]
            text = "".join(prefix + form for form in forms)
            lines.append((text, weight * frequency))

        count += len(words)
        if count >= MOST_WORDS:
            break
    return lines


def _unfolded(words: Sequence[str], code: str) -> Iterator[str]:
    """Yield words with the letters that the lists replace: ß in German, and the final sigma in Greek."""
    for word in words:
        if code == "el" and word.endswith("σ"):
            yield word[:-1] + "ς"
        else:
            yield word
        if code == "de" and "ss" in word:
            yield word.replace("ss", "ß")
