"""Other text: a run neither chooses by it nor counts it, and judges the model on it beside the named kinds."""

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


MAX_TOKENS = 4096  # of other text, of all documents together
READ_PER_TOKEN = 10  # tokens that calibrate for each one of other text, so that it takes less than a fifth of the run
DOCUMENT_TOKENS = 57  # that are read of each document, which gives one row, as the margin of error is over documents
MIN_TOKENS_READ = 4096  # a run that calibrates on fewer is a trial, and no model writes for it
TRIES_PER_DOCUMENT = 4  # documents of which one is long enough
HUB_SECONDS = 3.0  # in which the Hub answers, or other text does without
HUB, WRITTEN, BUILTIN = "from the Hub", "model-written", "built-in"


class OtherText(NamedTuple):
    """The source of other text, the beginnings of its documents, and its entries in a manifest.

    A beginning has the shape `(tokens,)`, behind a prefix. By the entries, nothing counts or reads the documents.
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
    """Gives other text from the first of Hub, model and built-in with enough; without rows if none has."""
    used = {name for each in domains for name in (*each.documents, *each.heldout_documents, *each.probe_documents)}
    used |= set() if seen is None else seen.uses().keys()
    read = sum(domain.samples.numel() for domain in domains)
    row = min(DOCUMENT_TOKENS, config.seq_length)
    count = max(min(MAX_TOKENS, read // READ_PER_TOKEN) // (row - 1), MIN_DOCUMENTS)
    sources: dict[str, Callable[[], Iterator[str]]] = {}
    if read >= MIN_TOKENS_READ:
        if not (config.languages or constants.HF_HUB_OFFLINE):
            sources[HUB] = partial(_from_hub, count)
        if can_write(model, tokenizer):
            sources[WRITTEN] = partial(_written, config, model, tokenizer, count * (row + 8))
    named = [text for text in texts_of(config) if not is_general(text)]
    beside = builtin_beside(named, bool(config.removes_tokens) and not config.languages)
    sources[BUILTIN] = partial(documents, DomainConfig(name=OTHER, source=beside), config.seed + 1, tokenizer)
    for where, texts in sources.items():
        found: dict[str, Tensor] = {}  # the beginnings of those that are long enough, by the hash of the document
        with suppress(StructPruneError):  # no network, or a model that writes nothing of use
            for text in islice(texts(), TRIES_PER_DOCUMENT * count):
                ids, name = tokenize_with_prefix(text, tokenizer), document_hash(text)
                if len(ids) >= row and name not in used:
                    found[name] = torch.tensor(ids[:row])
                if len(found) == count:
                    break
        if len(found) >= min(count, MIN_DOCUMENTS):
            together = torch.stack([*found.values()])
            entry = Entry.of(Domain(OTHER, 0.0, together[:0], together, heldout_documents=tuple(found)), JUDGED)
            return OtherText(where, [*together], [entry])
    return OtherText(BUILTIN)


def _written(
    config: StructPruneConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tokens: int
) -> Iterator[str]:
    """Yields text that the dense model writes behind words in the named languages, or English openings."""
    from ..domains.generated import self_documents
    from ..vocabulary.languages import openings

    prompts = openings(config.languages) if config.languages else None
    return self_documents(model, tokenizer, OTHER, config.seed, tokens, prompts)


def _from_hub(count: int) -> Iterator[str]:
    """The first rows of data sets of many kinds, which are kept on the disk."""
    parts = resolve([DomainConfig(name=OTHER, source=f"{PRESET}{OTHER}")])
    kept = KeptText(OTHER, count, [part.to_dict() for part in parts])
    texts = kept.read().get(OTHER, [])
    if not texts and process_index() == 0:
        with suppress(Exception):  # of the network, of the Hub, or of the disk
            from huggingface_hub import HfApi

            HfApi().dataset_info(parts[0].source, timeout=HUB_SECONDS)
            texts = [text for part in parts for text in islice(documents(part, None), 2 * ceil(count / len(parts)))]
            kept.add(OTHER, texts)
    texts = broadcast_object(texts)
    if not texts:
        raise StructPruneError("No text of the Hub can be read.")
    return iter(texts)


def respelled(
    texts: Sequence[Sequence[str]], before: PreTrainedTokenizerBase, after: PreTrainedTokenizerBase
) -> float:
    """The share of the words of texts that are spelled by other tokens after a trimming."""
    words = [f" {word}" for parts in texts for text in parts for word in text.split()]
    spelled = zip(*([reader.tokenize(word) for word in words] for reader in (before, after)), strict=True)
    return sum(old != new for old, new in spelled) / max(len(words), 1)
