"""Held-out text: a source in its own order, cut into samples, for evaluation."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..config.domains import DomainConfig
from ..domains.packing import Frame, prefix_token, tokenised
from ..domains.sources import documents, endless
from ..errors import StructPruneError


@dataclass(frozen=True)
class Heldout:
    """The first samples of a domain, shape `(num_samples, seq_length)`, with the SHA-256 of each document in them."""

    domain: DomainConfig
    samples: Tensor
    documents: tuple[str, ...]


def read_heldout(
    domain: DomainConfig, tokenizer: PreTrainedTokenizerBase, seq_length: int, num_samples: int | None = None
) -> Heldout:
    """Read a domain in the order of its source and cut it into samples; what does not fill the last is left out."""
    if num_samples is None and endless(domain):
        raise StructPruneError(
            f"The domain {domain.name!r} ({domain.source}) has no known end; say how many samples to read "
            "(num_samples)."
        )
    frame = Frame(seq_length, prefix_token(tokenizer), tokenizer.eos_token_id)
    if seq_length < 2:
        raise StructPruneError(f"seq_length={seq_length} leaves nothing to predict; 2 is the least.")
    most = sys.maxsize if num_samples is None else num_samples
    texts = frame.take(tokenised(documents(domain, None, tokenizer), tokenizer), most * frame.body)
    if not texts:
        raise StructPruneError(f"The domain {domain.name!r} is empty; name text that holds documents.")
    if frame.length(texts) < frame.body:
        raise StructPruneError(
            f"The domain {domain.name!r} has {sum(len(text.ids) for text in texts)} tokens, and a sample takes "
            f"{frame.body}; choose a smaller seq_length."
        )
    packed = frame.pack(texts, most)
    return Heldout(domain, packed.samples, packed.hashes)
