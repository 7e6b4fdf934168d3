"""Load unseen text, which measures a pruned model on text that no choice of the run depends on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import islice
from math import ceil
from typing import NamedTuple

import torch
from huggingface_hub import constants
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..config.domains import BUILT_IN, FROM_HUB, MODEL_WRITTEN, OTHER, PRESET, DomainConfig, is_general
from ..config.pruning import StructPruneConfig
from ..system.errors import StructPruneError
from ..system.margins import MIN_DOCUMENTS
from ..system.processes import broadcast_object, process_index
from ..system.stored import TextCache
from .load import builtin_source_except, can_write, texts_of
from .manifest import JUDGED, Entry, Manifest
from .packing import Domain, document_hash, tokenize_with_prefix
from .sources import documents, resolve


# The maximum number of tokens, over all documents.
MAX_UNSEEN_TOKENS = 4096
# The maximum number of tokens of each text that a search chooses by.
TOKENS_FOR_CHOICES = 2048
# The number of calibration tokens per token of unseen text. The measurement then takes less than a fifth of the run.
CALIBRATION_PER_TOKEN = 10
# The number of tokens of a document. Each document is one row, because the margin of error is over documents.
DOCUMENT_TOKENS = 57
# The model does not write text for a run with fewer calibration tokens, because such a run is only a test.
MIN_TOKENS_READ = 4096
# The number of documents to read for each document that is long enough.
TRIES_PER_DOCUMENT = 4
# The timeout of the Hub in seconds.
HUB_SECONDS = 3.0
# The number of tokens that the model writes after the row, in each document.
WRITTEN_MARGIN = 8


class UnseenText(NamedTuple):
    """Unseen text.

    Attributes:
        source: The source of the text.
        rows: The first tokens of each document, shape `(tokens,)`, after a prefix.
        entries: The entries of the text in a manifest. A later run does not calibrate on documents in its manifest.
    """

    source: str
    rows: Sequence[Tensor] = ()
    entries: Sequence[Entry] = ()


def unseen_text(
    config: StructPruneConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    domains: Sequence[Domain],
    earlier: Manifest | None = None,
) -> UnseenText:
    """Return unseen text from the first source with enough documents: the Hub, the model itself, or built-in text.

    The result has no rows if no source has enough documents.

    Args:
        config: The config of the run.
        model: The original model.
        tokenizer: The tokenizer of the original model.
        domains: The domains of the run. Their documents are not unseen text.
        earlier: The text of earlier runs. Its documents are not unseen text either.
    """
    excluded = _excluded_documents(domains, earlier)
    calibration_tokens = sum(domain.samples.numel() for domain in domains)
    length = min(DOCUMENT_TOKENS, config.seq_length)
    num_tokens = min(MAX_UNSEEN_TOKENS, calibration_tokens // CALIBRATION_PER_TOKEN)
    if config.removes_only_tokens:
        # Measuring would take most of the run.
        num_tokens //= 2
    count = max(num_tokens // (length - 1), MIN_DOCUMENTS)

    sources = _sources(config, model, tokenizer, calibration_tokens, length, count)
    for source, read_documents in sources.items():
        rows = _first_rows(read_documents, tokenizer, excluded, length, count)
        if len(rows) >= min(count, MIN_DOCUMENTS):
            samples = torch.stack(list(rows.values()))
            domain = Domain(OTHER, 0.0, samples[:0], samples, heldout_documents=tuple(rows))
            return UnseenText(source, list(samples), [Entry.of(domain, JUDGED)])

    return UnseenText(BUILT_IN)


def texts_for_choices(
    config: StructPruneConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    domains: Sequence[Domain],
    earlier: Manifest,
) -> Iterator[UnseenText]:
    """Yield built-in text and text that the model writes, for a search that chooses by text beyond the domains.

    The arguments are those of `unseen_text`. `earlier` has the unseen text of the run, which these texts exclude.
    """
    excluded = _excluded_documents(domains, earlier)
    calibration_tokens = sum(domain.samples.numel() for domain in domains)
    length = min(DOCUMENT_TOKENS, config.seq_length)
    count = max(min(TOKENS_FOR_CHOICES, calibration_tokens // CALIBRATION_PER_TOKEN) // (length - 1), MIN_DOCUMENTS)

    # Another seed, so that the model writes other text.
    sources = _sources(replace(config, seed=config.seed + 2), model, tokenizer, calibration_tokens, length, count)
    for source in (BUILT_IN, MODEL_WRITTEN):
        if source in sources:
            rows = _first_rows(sources[source], tokenizer, excluded, length, count)
            if rows:
                samples = torch.stack(list(rows.values()))
                domain = Domain(OTHER, 0.0, samples[:0], samples[:0], probe=samples, probe_documents=tuple(rows))
                yield UnseenText(source, list(samples), [Entry.of(domain, JUDGED)])


def _first_rows(
    read_documents: Callable[[], Iterator[str]],
    tokenizer: PreTrainedTokenizerBase,
    excluded: set[str],
    length: int,
    count: int,
) -> dict[str, Tensor]:
    """Return the first `length` tokens of up to `count` documents of a source, shape `(length,)`, by their hashes."""
    rows: dict[str, Tensor] = {}
    # A source fails without a network, or if the model writes no usable text. Its rows up to then are used.
    with suppress(StructPruneError):
        texts = islice(read_documents(), TRIES_PER_DOCUMENT * count)
        for document, row in _rows(texts, tokenizer, excluded, length):
            rows[document] = row
            if len(rows) == count:
                break
    return rows


def _excluded_documents(domains: Sequence[Domain], earlier: Manifest | None) -> set[str]:
    """Return the hashes of the documents of this run and of earlier runs."""
    documents: set[str] = set()
    if earlier is not None:
        documents.update(earlier.uses())

    for domain in domains:
        documents.update(domain.documents, domain.heldout_documents, domain.probe_documents)
    return documents


def _sources(
    config: StructPruneConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    calibration_tokens: int,
    length: int,
    count: int,
) -> dict[str, Callable[[], Iterator[str]]]:
    """Return functions that read unseen text, by source, in the order of preference."""
    sources: dict[str, Callable[[], Iterator[str]]] = {}
    if calibration_tokens >= MIN_TOKENS_READ:
        if not config.languages and not constants.HF_HUB_OFFLINE:
            sources[FROM_HUB] = partial(_from_hub, count)
        if can_write(model, tokenizer):
            sources[MODEL_WRITTEN] = partial(_written, config, model, tokenizer, count * (length + WRITTEN_MARGIN))

    user_texts = [text for text in texts_of(config) if not is_general(text)]
    trims_languages = bool(config.removes_tokens) and not config.languages
    domain = DomainConfig(name=OTHER, source=builtin_source_except(user_texts, trims_languages))
    sources[BUILT_IN] = partial(documents, domain, config.seed + 1, tokenizer)
    return sources


def _rows(
    texts: Iterator[str], tokenizer: PreTrainedTokenizerBase, excluded: set[str], length: int
) -> Iterator[tuple[str, Tensor]]:
    """Yield the hash and the first `length` tokens of each document, shape `(length,)`.

    Documents that are shorter or excluded are skipped.
    """
    for text in texts:
        ids = tokenize_with_prefix(text, tokenizer)
        document = document_hash(text)
        if len(ids) >= length and document not in excluded:
            yield document, torch.tensor(ids[:length])


def _written(
    config: StructPruneConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tokens: int
) -> Iterator[str]:
    """Let the original model continue words in the configured languages, or English openings."""
    from .generated import self_documents
    from .languages import openings

    prompts = None
    if config.languages:
        prompts = openings(config.languages)
    return self_documents(model, tokenizer, OTHER, config.seed, tokens, prompts)


def _from_hub(count: int) -> Iterator[str]:
    """Return the first rows of data sets of many kinds. The rows are cached on the disk."""
    data_sets = resolve([DomainConfig(name=OTHER, source=f"{PRESET}{OTHER}")])
    cache = TextCache(OTHER, count, [data_set.to_dict() for data_set in data_sets])
    texts = cache.read().get(OTHER, [])

    if not texts and process_index() == 0:
        # The network, the Hub and the disk raise errors of many kinds.
        with suppress(Exception):
            texts = _download(data_sets, count)
            cache.add(OTHER, texts)

    texts = broadcast_object(texts)
    if not texts:
        raise StructPruneError("No text of the Hub can be read.")
    return iter(texts)


def _download(data_sets: Sequence[DomainConfig], count: int) -> list[str]:
    """Return the first rows of data sets, about `2 * count` in all."""
    from huggingface_hub import HfApi

    # A data set would wait for the network for minutes, so a short request comes first.
    HfApi().dataset_info(data_sets[0].source, timeout=HUB_SECONDS)

    rows_per_data_set = 2 * ceil(count / len(data_sets))
    texts: list[str] = []
    for data_set in data_sets:
        texts.extend(islice(documents(data_set, None), rows_per_data_set))
    return texts


def respelled(
    texts: Sequence[Sequence[str]], tokenizer: PreTrainedTokenizerBase, smaller_tokenizer: PreTrainedTokenizerBase
) -> float:
    """Return the share of words that a smaller tokenizer splits into other tokens.

    Args:
        texts: The texts, each as a list of its parts.
        tokenizer: The tokenizer of the original model.
        smaller_tokenizer: The tokenizer of the pruned model.
    """
    num_words = 0
    num_respelled = 0
    for parts in texts:
        for part in parts:
            for word in part.split():
                num_words += 1
                num_respelled += tokenizer.tokenize(f" {word}") != smaller_tokenizer.tokenize(f" {word}")

    return num_respelled / max(num_words, 1)
