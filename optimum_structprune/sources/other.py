"""Other text: no choice of a run depends on it, and the model is evaluated on it beside the named domains."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from itertools import islice
from math import ceil
from typing import NamedTuple

import torch
from huggingface_hub import constants
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..config.domains import OTHER, PRESET, DomainConfig, is_general
from ..config.pruning import StructPruneConfig
from ..domains.load import builtin_beside, can_write, texts_of
from ..domains.manifest import JUDGED, Entry, Manifest
from ..domains.packing import Domain, document_hash, tokenize_with_prefix
from ..domains.sources import documents, resolve
from ..errors import StructPruneError
from ..forward.metrics import MIN_DOCUMENTS
from ..system.fingerprint import KeptText
from ..system.processes import broadcast_object, process_index


# The tokens of other text, of all documents together.
MAX_TOKENS = 4096
# One token of other text is read for so many calibration tokens, so that it takes less than a fifth of the run.
CALIBRATION_PER_TOKEN = 10
# Tokens of each document. It makes one row, because the margin of error is over documents.
DOCUMENT_TOKENS = 57
# A run that calibrates on fewer tokens is a trial, and no model writes text for it.
MIN_TOKENS_READ = 4096
# One in so many documents is long enough.
TRIES_PER_DOCUMENT = 4
# The seconds in which the Hub must answer.
HUB_SECONDS = 3.0
# Tokens that the model writes in each document beyond the row.
WRITTEN_MARGIN = 8
HUB, WRITTEN, BUILTIN = "from the Hub", "model-written", "built-in"


class OtherText(NamedTuple):
    """Other text.

    Attributes:
        source: Where it comes from.
        rows: The first tokens of each document, shape `(tokens,)`, with a prefix in front.
        entries: Its entries in a manifest, by which no later run calibrates on these documents.
    """

    source: str
    rows: Sequence[Tensor] = ()
    entries: Sequence[Entry] = ()


def other_text(
    config: StructPruneConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    domains: Sequence[Domain],
    seen: Manifest | None = None,
) -> OtherText:
    """Return other text from the first source with enough documents: the Hub, the model itself, or built-in text.

    The result has no rows if no source has enough.

    Args:
        config: The config of the run.
        model: The dense model.
        tokenizer: Its tokenizer.
        domains: The domains of the run, whose documents do not count as other text.
        seen: The text of earlier runs, whose documents do not count either.
    """
    used = _used_documents(domains, seen)
    calibration_tokens = sum(domain.samples.numel() for domain in domains)
    length = min(DOCUMENT_TOKENS, config.seq_length)
    most_tokens = min(MAX_TOKENS, calibration_tokens // CALIBRATION_PER_TOKEN)
    count = max(most_tokens // (length - 1), MIN_DOCUMENTS)

    for source, documents_of in _sources(config, model, tokenizer, calibration_tokens, length, count).items():
        rows: dict[str, Tensor] = {}
        # A source fails without a network, or if the model writes nothing useful. What it gave before still counts.
        with suppress(StructPruneError):
            for name, row in _rows(islice(documents_of(), TRIES_PER_DOCUMENT * count), tokenizer, used, length):
                rows[name] = row
                if len(rows) == count:
                    break
        if len(rows) >= min(count, MIN_DOCUMENTS):
            samples = torch.stack(list(rows.values()))
            domain = Domain(OTHER, 0.0, samples[:0], samples, heldout_documents=tuple(rows))
            return OtherText(source, list(samples), [Entry.of(domain, JUDGED)])
    return OtherText(BUILTIN)


def _used_documents(domains: Sequence[Domain], seen: Manifest | None) -> set[str]:
    """Return the hashes of the documents of this run and of earlier runs."""
    used = set() if seen is None else set(seen.uses())
    for domain in domains:
        used.update(domain.documents, domain.heldout_documents, domain.probe_documents)
    return used


def _sources(
    config: StructPruneConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    calibration_tokens: int,
    length: int,
    count: int,
) -> dict[str, Callable[[], Iterator[str]]]:
    """Return the sources of other text for a run, in the order in which they are tried."""
    sources: dict[str, Callable[[], Iterator[str]]] = {}
    if calibration_tokens >= MIN_TOKENS_READ:
        if not config.languages and not constants.HF_HUB_OFFLINE:
            sources[HUB] = partial(_from_hub, count)
        if can_write(model, tokenizer):
            sources[WRITTEN] = partial(_written, config, model, tokenizer, count * (length + WRITTEN_MARGIN))

    named = [text for text in texts_of(config) if not is_general(text)]
    trims_languages = bool(config.removes_tokens) and not config.languages
    domain = DomainConfig(name=OTHER, source=builtin_beside(named, trims_languages))
    sources[BUILTIN] = partial(documents, domain, config.seed + 1, tokenizer)
    return sources


def _rows(
    texts: Iterator[str], tokenizer: PreTrainedTokenizerBase, used: set[str], length: int
) -> Iterator[tuple[str, Tensor]]:
    """Yield the hash and the first `length` tokens of each unused document that has so many, shape `(length,)`."""
    for text in texts:
        ids = tokenize_with_prefix(text, tokenizer)
        name = document_hash(text)
        if len(ids) >= length and name not in used:
            yield name, torch.tensor(ids[:length])


def _written(
    config: StructPruneConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tokens: int
) -> Iterator[str]:
    """Return text that the dense model continues from words in the named languages, or from English openings."""
    from ..domains.generated import self_documents
    from ..vocabulary.languages import openings

    prompts = openings(config.languages) if config.languages else None
    return self_documents(model, tokenizer, OTHER, config.seed, tokens, prompts)


def _from_hub(count: int) -> Iterator[str]:
    """Return the first rows of data sets of many kinds, which are cached on the disk."""
    parts = resolve([DomainConfig(name=OTHER, source=f"{PRESET}{OTHER}")])
    cache = KeptText(OTHER, count, [part.to_dict() for part in parts])
    texts = cache.read().get(OTHER, [])
    if not texts and process_index() == 0:
        # Whatever the network, the Hub or the disk raises.
        with suppress(Exception):
            from huggingface_hub import HfApi

            HfApi().dataset_info(parts[0].source, timeout=HUB_SECONDS)
            rows_per_part = 2 * ceil(count / len(parts))
            texts = [text for part in parts for text in islice(documents(part, None), rows_per_part)]
            cache.add(OTHER, texts)
    texts = broadcast_object(texts)
    if not texts:
        raise StructPruneError("No text of the Hub can be read.")
    return iter(texts)


def respelled(
    texts: Sequence[Sequence[str]], before: PreTrainedTokenizerBase, after: PreTrainedTokenizerBase
) -> float:
    """Return the share of the words of texts that a smaller tokenizer splits into other tokens."""
    words = [f" {word}" for parts in texts for text in parts for word in text.split()]
    changed = sum(before.tokenize(word) != after.tokenize(word) for word in words)
    return changed / max(len(words), 1)
