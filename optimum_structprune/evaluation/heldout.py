"""Held-out text for evaluation: a source in its own order, cut into samples, and what each model makes of them."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..config.domains import DomainConfig
from ..domains.packing import Passages, SampleFormat, check_vocabulary, document_numbers, tokenised
from ..domains.sources import documents, endless
from ..domains.templates import read_lines
from ..errors import StructPruneError
from ..forward.metrics import compare, evaluating, perplexity_figures, row_losses, sample_losses
from ..vocabulary.token_alignment import TokenAlignment, divergence_from_dense


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
    frame = SampleFormat.of(tokenizer, seq_length)
    most = sys.maxsize if num_samples is None else num_samples
    texts = frame.take(tokenised(documents(domain, None, tokenizer), tokenizer), most * frame.body)
    if not texts:
        raise StructPruneError(f"The domain {domain.name!r} is empty; name text that holds documents.")
    if frame.length(texts) < frame.body:
        raise StructPruneError(
            f"The domain {domain.name!r} has {sum(len(text.ids) for text in texts)} tokens, and a sample takes "
            f"{frame.body}; choose a smaller seq_length."
        )
    return Heldout(domain, *frame.pack(texts, most))


def read_pairs(paths: Sequence[str | Path]) -> dict[str, list[str]]:
    """The texts of files with a text and its translation in each line of JSON, by name; all translations come last."""
    found = dict[str, list[str]]()
    for path, name in zip(paths, told_apart([Path(path).stem for path in paths], paths), strict=True):
        pairs = read_lines(Path(path), _pair, 'is no pair of two texts, such as {"en": "…", "de": "…"}')
        if not pairs:
            raise StructPruneError(f"The file {path} has no pairs of texts.")
        found[f"pairs {name}"] = [text for texts in zip(*pairs, strict=True) for text in texts]
    return found


def told_apart(names: Sequence[str], paths: Sequence[str | Path]) -> list[str]:
    """Gives names, and the path in place of each that another has too."""
    return [name if names.count(name) == 1 else str(path) for name, path in zip(names, paths, strict=True)]


def _pair(line: str) -> tuple[str, str]:
    row = json.loads(line)
    first, second = map(str.strip, row.values() if isinstance(row, dict) else row)
    if not (first.encode() and second.encode()):  # half a character is refused too
        raise ValueError("a text is empty")
    return first, second


class Judged:
    """A text in samples of the dense tokenizer, shape `(samples, seq_length)`, that models are judged on. `rows` has
    them as each model reads them where the tokenizers differ, and `parts` what is left of the dense tokens then.
    """

    def __init__(
        self,
        samples: Tensor,
        models: Mapping[str, PreTrainedModel],
        readers: Mapping[str, PreTrainedTokenizerBase],
        tokens_differ: bool,
        parts: TokenAlignment | None = None,
    ):
        self.samples, self.parts = samples, parts
        self.documents = document_numbers(samples, readers["dense"].eos_token_id)[:, 0]
        self.pair = {which: models[which] for which in ("model", "dense") if which in models}
        self.passages = Passages([*samples], readers["dense"])
        self.rows: dict[str, list[Tensor]] = {}
        if tokens_differ:
            self.rows = {which: self.passages.rows(readers[which], model) for which, model in models.items()}
        else:
            check_vocabulary(int(samples.max()), models["model"].config.get_text_config().vocab_size)

    def figures(self, batch_size: int | None = None) -> dict[str, Any]:
        """The figures of one domain for an `Evaluation`, by its fields, as far as models and vocabularies allow."""
        models, predicted, close = [*self.pair.values()], self.samples.shape[1] - 1, dict[str, float]()
        if self.rows:
            losses = {which: row_losses(self.pair[which], rows) / predicted for which, rows in self.rows.items()}
            if self.parts is not None:
                rows = self.samples.tolist()
                with evaluating(*models):
                    far = divergence_from_dense(self.parts, models[1], models[0], rows, repeat(1, len(rows)))
                close = {"divergence": float(far.sum()) / self.samples[:, 1:].numel()}
        elif len(models) == 1:
            losses = {"model": sample_losses(models[0], self.samples, batch_size)}
        else:
            losses, pair = compare(models[0], models[1], self.samples, batch_size)
            close = dict(zip(("divergence", "agreement"), pair, strict=True))
        return {
            **perplexity_figures(losses, self.samples[:, 1:].numel(), self.documents),
            "bits_per_byte": {which: self.passages.bits_per_byte(loss * predicted) for which, loss in losses.items()},
            **close,
        }
