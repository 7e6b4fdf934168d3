"""Held-out text as each model reads it: in the same tokens, or each with its own tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..domains.load import check_vocabulary
from ..domains.passages import Passages
from ..forward.metrics import closeness, compare, row_losses, sample_losses
from ..system.fingerprint import vocabulary_hash
from .heldout import Heldout


def judge(
    texts: Sequence[Heldout], models: Mapping[str, PreTrainedModel], readers: Mapping[str, PreTrainedTokenizerBase]
) -> dict[str, Judged]:
    """Texts of the dense tokenizer by domain, as the models read them."""
    sizes = {model.config.get_text_config().vocab_size for model in models.values()}
    apart = len(sizes) > 1 or len(set(map(vocabulary_hash, readers.values()))) > 1
    return {text.domain.name: Judged(text.samples, models, readers, apart) for text in texts}


class Judged:
    """Samples of the dense tokenizer, shape `(samples, seq_length)`, that models are judged on. Where the tokenizers
    differ (`apart`), each reads their text with its own.
    """

    def __init__(
        self,
        samples: Tensor,
        models: Mapping[str, PreTrainedModel],
        readers: Mapping[str, PreTrainedTokenizerBase],
        apart: bool,
    ):
        self.samples, self.models, self.apart = samples, models, apart
        self.pair = [which for which in ("model", "dense") if which in models]
        self.passages = Passages([*samples], readers["dense"])
        if not apart:
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
        if self.apart:
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
