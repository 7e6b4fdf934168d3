"""Read held-out text for an evaluation, and cut it into samples."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..arch.meta import positions_of
from ..config.domains import DomainConfig
from ..domains.packing import SampleFormat, tokenised
from ..domains.sources import documents, endless
from ..measure.text import Text
from ..record.figures import ORIGINAL
from ..system.errors import StructPruneError, warn


@dataclass(frozen=True)
class Heldout:
    """The first samples of a domain.

    Attributes:
        domain: The domain.
        samples: The token ids, shape `(num_samples, seq_length)`.
        documents: The SHA-256 of each document in the samples.
    """

    domain: DomainConfig
    samples: Tensor
    documents: tuple[str, ...]


def read_heldout(
    domain: DomainConfig, tokenizer: PreTrainedTokenizerBase, seq_length: int, num_samples: int | None = None
) -> Heldout:
    """Read a domain in the order of its source and cut it into samples.

    The text after the last full sample is left out.

    Args:
        domain: The domain.
        tokenizer: The tokenizer of the samples.
        seq_length: The number of tokens in a sample.
        num_samples: The maximum number of samples; None reads the domain to its end.

    Raises:
        StructPruneError: If the domain has no known end and `num_samples` is None, or it has too little text.
    """
    if num_samples is None and endless(domain):
        raise StructPruneError(
            f"The domain {domain.name!r} ({domain.source}) has no known end. Pass the number of samples to read "
            "(`num_samples`)."
        )

    sample_format = SampleFormat.of(tokenizer, seq_length)
    max_samples = sys.maxsize if num_samples is None else num_samples
    rows = tokenised(documents(domain, None, tokenizer), tokenizer)
    texts = sample_format.take(rows, max_samples * sample_format.body)
    if not texts:
        raise StructPruneError(f"The domain {domain.name!r} is empty. Pass documents that have tokens.")
    if sample_format.length(texts) < sample_format.body:
        num_tokens = sum(len(text.ids) for text in texts)
        raise StructPruneError(
            f"The domain {domain.name!r} has {num_tokens} tokens, and a sample takes {sample_format.body}. Pass a "
            "smaller `seq_length`."
        )

    samples, names = sample_format.pack(texts, max_samples)
    return Heldout(domain, samples, names)


def cut_texts(
    texts: Sequence[Heldout],
    models: Mapping[str, PreTrainedModel],
    tokenizers: Mapping[str, PreTrainedTokenizerBase],
) -> list[Heldout]:
    """Cut the samples of all domains so that each model has enough positions for their text in its own tokens.

    Args:
        texts: The domains, with samples of equal length.
        models: The models, by `pruned` and, where there is one, `original`.
        tokenizers: Their tokenizers. `original`, which has cut the samples, is required.
    """
    original_length = texts[0].samples.shape[1]
    length = original_length
    for text in texts:
        for name, model in models.items():
            cut_text = Text.of(text.samples[:, :length], tokenizers[ORIGINAL])
            length = len(cut_text.cut(positions_of(model), tokenizers[name]).rows[0])

    if length < original_length:
        warn(
            f"The samples are cut from {original_length} to {length} tokens, because a model has too few positions "
            "for their text in its own tokens."
        )
    return [replace(text, samples=text.samples[:, :length]) for text in texts]
