"""Held-out text for evaluation: a source in its own order, cut into samples, and what each model makes of them."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..config.domains import DomainConfig
from ..domains.packing import SampleFormat, check_vocabulary, prefix_token, tokenised
from ..domains.passages import Passages
from ..domains.sources import documents, endless
from ..errors import StructPruneError
from ..forward.metrics import closeness, compare, row_losses, sample_losses
from ..system.fingerprint import vocabulary_hash


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
    frame = SampleFormat(seq_length, prefix_token(tokenizer), tokenizer.eos_token_id)
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


def judge(
    texts: Sequence[Heldout], models: Mapping[str, PreTrainedModel], readers: Mapping[str, PreTrainedTokenizerBase]
) -> dict[str, Judged]:
    """Texts of the dense tokenizer by domain, as the models read them."""
    sizes = {model.config.get_text_config().vocab_size for model in models.values()}
    tokens_differ = len(sizes) > 1 or len(set(map(vocabulary_hash, readers.values()))) > 1
    return {text.domain.name: Judged(text.samples, models, readers, tokens_differ) for text in texts}


class Judged:
    """Samples of the dense tokenizer, shape `(samples, seq_length)`, that models are judged on. Where the tokenizers
    differ (`tokens_differ`), each reads their text with its own.
    """

    def __init__(
        self,
        samples: Tensor,
        models: Mapping[str, PreTrainedModel],
        readers: Mapping[str, PreTrainedTokenizerBase],
        tokens_differ: bool,
    ):
        self.samples, self.models, self.tokens_differ = samples, models, tokens_differ
        self.pair = [which for which in ("model", "dense") if which in models]
        self.passages = Passages([*samples], readers["dense"])
        if not tokens_differ:
            check_vocabulary(int(samples.max()), models["model"].config.get_text_config().vocab_size)
        else:
            self.rows = {which: self.passages.rows(readers[which], model) for which, model in models.items()}
            both = [readers[which] for which in self.pair], [models[which] for which in self.pair]
            self.shared = self.passages.shared_rows(*both) if "dense" in models else None

    def losses(self, batch_size: int) -> tuple[dict[str, Tensor], tuple[float, float] | None]:
        """The losses of each model per dense token in each sample, shape `(samples,)`, and beside a dense model the
        divergence and the agreement, as far as the vocabularies allow.
        """
        models = [self.models[which] for which in self.pair]
        if self.tokens_differ:
            predicted = self.samples.shape[1] - 1
            losses = {which: row_losses(self.models[which], rows) / predicted for which, rows in self.rows.items()}
            return losses, closeness(models, *self.shared) if self.shared else None
        if len(models) == 1:
            return {"model": sample_losses(models[0], self.samples, batch_size)}, None
        both = compare(models[0], models[1], self.samples, batch_size)
        return {"dense": both.dense_losses, "model": both.losses}, (both.divergence, both.agreement)

    def bits_per_byte(self, losses: Tensor) -> float:
        """What `losses` gave, in bits per byte of the text."""
        return self.passages.bits_per_byte(losses * (self.samples.shape[1] - 1))
