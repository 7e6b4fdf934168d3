"""Read held-out text for an evaluation, cut it into samples, and measure models on them."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import repeat
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..arch.meta import positions_of
from ..config.domains import DomainConfig
from ..domains.packing import (
    Passages,
    SampleFormat,
    check_vocabulary,
    cut_to_positions,
    document_numbers,
    tokenised,
)
from ..domains.sources import documents, endless
from ..domains.templates import read_lines
from ..errors import StructPruneError, warn
from ..forward.metrics import compare, evaluating, row_losses, sample_losses
from ..record.figures import DENSE, PRUNED, DomainResult, Figure, perplexity_result
from ..vocabulary.token_alignment import TokenAlignment, divergence_from_dense


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
        models: The models, by `pruned` and, where there is one, `dense`.
        tokenizers: Their tokenizers. `dense`, which has cut the samples, is required.
    """
    original_length = texts[0].samples.shape[1]
    length = original_length
    for text in texts:
        for name, model in models.items():
            samples = text.samples[:, :length]
            samples = cut_to_positions(samples, tokenizers[DENSE], positions_of(model), tokenizers[name])
            length = samples.shape[1]

    if length < original_length:
        warn(
            f"The samples are cut from {original_length} to {length} tokens, because a model has too few positions "
            "for their text in its own tokens."
        )
    return [replace(text, samples=text.samples[:, :length]) for text in texts]


def read_pairs(paths: Sequence[str | Path]) -> dict[str, list[str]]:
    """Read files with a text and its translation in each line of JSON.

    Returns:
        The texts of each file by its name. The second half translates the first half.

    Raises:
        StructPruneError: If a file cannot be read, has no pairs, or a line is not a pair.
    """
    names = distinct_names([Path(path).stem for path in paths], paths)
    texts_by_name: dict[str, list[str]] = {}

    for path, name in zip(paths, names, strict=True):
        pairs = read_lines(Path(path), _pair, 'is not a pair of two texts, such as {"en": "…", "de": "…"}')
        if not pairs:
            raise StructPruneError(f"The file {path} has no pairs of texts.")

        texts = [text for text, _ in pairs]
        texts += [translation for _, translation in pairs]
        texts_by_name[f"pairs {name}"] = texts

    return texts_by_name


def distinct_names(names: Sequence[str], paths: Sequence[str | Path]) -> list[str]:
    """Return unique names: the path replaces each name that occurs more than once."""
    unique_names = []
    for name, path in zip(names, paths, strict=True):
        unique_names.append(name if names.count(name) == 1 else str(path))
    return unique_names


def _pair(line: str) -> tuple[str, str]:
    """Return the text and its translation in a line of JSON."""
    row = json.loads(line)
    values = row.values() if isinstance(row, dict) else row
    text, translation = map(str.strip, values)

    # Encoding also raises an error for half of a surrogate pair.
    if not text.encode() or not translation.encode():
        raise ValueError("a text is empty")
    return text, translation


class EvaluationText:
    """One domain of an evaluation, which each model reads with its own tokenizer.

    Args:
        samples: The token ids of the original tokenizer, shape `(samples, seq_length)`.
        models: The models, by `pruned` and, where there is one, `dense`.
        tokenizers: Their tokenizers. `dense` is required.
        tokens_differ: Whether the tokenizers differ.
        parts: The tokens of the original model as parts of the model's tokens; None if the model cannot spell them.
    """

    def __init__(
        self,
        samples: Tensor,
        models: Mapping[str, PreTrainedModel],
        tokenizers: Mapping[str, PreTrainedTokenizerBase],
        tokens_differ: bool,
        parts: TokenAlignment | None = None,
    ):
        self.samples = samples
        self.models = models
        self.parts = parts
        self.documents = document_numbers(samples, tokenizers[DENSE].eos_token_id)[:, 0]
        self.passages = Passages(list(samples), tokenizers[DENSE])

        # The passages in the tokens of each model; empty if all models read the samples.
        self.rows: dict[str, list[Tensor]] = {}
        if tokens_differ:
            for name, model in models.items():
                self.rows[name] = self.passages.rows(tokenizers[name], model)
        else:
            check_vocabulary(int(samples.max()), models[PRUNED].config.get_text_config().vocab_size)

    def measure(self, batch_size: int | None = None) -> DomainResult:
        """Return the figures of this domain that the models and their vocabularies allow."""
        measured_losses, divergence, agreement = self._losses(batch_size)
        # A figure names the original model first.
        losses = {name: measured_losses[name] for name in (DENSE, PRUNED) if name in measured_losses}

        num_predicted = self.samples.shape[1] - 1
        result = perplexity_result(losses, self.samples[:, 1:].numel(), self.documents)
        bits = {name: self.passages.bits_per_byte(loss * num_predicted) for name, loss in losses.items()}
        result.bits_per_byte = Figure.of(bits)
        if divergence is not None:
            result.divergence = Figure(pruned=divergence)
        if agreement is not None:
            result.agreement = Figure(pruned=agreement)
        return result

    def _losses(self, batch_size: int | None) -> tuple[dict[str, Tensor], float | None, float | None]:
        """Measure the models.

        Returns:
            The mean loss per token of each sample by model, shape `(samples,)`; the divergence; and the agreement.
        """
        if self.rows:
            return self._losses_of_rows(), self._divergence_in_parts(), None

        model = self.models[PRUNED]
        dense = self.models.get(DENSE)
        if dense is None:
            return {PRUNED: sample_losses(model, self.samples, batch_size)}, None, None

        losses, (divergence, agreement) = compare(model, dense, self.samples, batch_size)
        return {DENSE: losses["dense"], PRUNED: losses["model"]}, divergence, agreement

    def _losses_of_rows(self) -> dict[str, Tensor]:
        """Return the loss of each sample per token of the original model, by model, where each has its own tokens."""
        num_predicted = self.samples.shape[1] - 1
        losses = {}
        for name, rows in self.rows.items():
            losses[name] = row_losses(self.models[name], rows) / num_predicted
        return losses

    def _divergence_in_parts(self) -> float | None:
        """Return the divergence per token of the original model, whose tokens the model spells in parts."""
        if self.parts is None:
            return None

        rows = self.samples.tolist()
        model = self.models[PRUNED]
        dense = self.models[DENSE]
        with evaluating(model, dense):
            divergences = divergence_from_dense(self.parts, dense, model, rows, repeat(1, len(rows)))
        return float(divergences.sum()) / self.samples[:, 1:].numel()
