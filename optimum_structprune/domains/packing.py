"""Documents to token samples of equal length."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .templates import Document, document_hash


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DOCUMENTS_PER_CALL = 32


@dataclass(frozen=True)
class Tokens:
    """A document as the model reads it.

    Attributes:
        ids: Its tokens.
        answers: For each token whether it belongs to an answer; None where nobody asks.
        hash: SHA-256 of the document's text.
    """

    ids: list[int]
    answers: list[bool] | None
    hash: str


@dataclass(frozen=True)
class Packed:
    """Token samples.

    Attributes:
        samples: Shape `(num_samples, seq_length)`, int64.
        mask: Which tokens give evidence, of the same shape; None for all.
        documents: Hashes of the documents in each sample.
    """

    samples: Tensor
    mask: Tensor | None
    documents: tuple[tuple[str, ...], ...]

    def select(self, indices: Sequence[int]) -> Packed:
        """Some of the samples."""
        index = torch.tensor(indices, dtype=torch.long)
        mask = None if self.mask is None else self.mask[index]
        return Packed(self.samples[index], mask, tuple(self.documents[i] for i in indices))

    @property
    def hashes(self) -> tuple[str, ...]:
        """Of all documents, each once, in the order of their first use."""
        return tuple(dict.fromkeys(name for sample in self.documents for name in sample))


@dataclass(frozen=True)
class Frame:
    """What a sample holds apart from text.

    Attributes:
        seq_length: Tokens per sample.
        prefix: Stands at the head of every sample.
        eos: Stands between two documents.
    """

    seq_length: int
    prefix: int | None
    eos: int | None

    @property
    def body(self) -> int:
        """Tokens of text per sample."""
        return self.seq_length - (self.prefix is not None)

    def take(self, tokenised: Iterator[Tokens], need: int) -> list[Tokens]:
        """Whole documents with `need` tokens or more, or all there are.

        What is left of the last one is dropped later, so that no document serves twice.
        """
        taken: list[Tokens] = []
        have = 0
        while have < need and (document := next(tokenised, None)) is not None:
            have += len(document.ids) + self._gap(taken)
            taken.append(document)
        return taken

    def length(self, documents: Sequence[Tokens]) -> int:
        """Tokens of text that documents make, with what stands between them."""
        return sum(len(document.ids) for document in documents) + self._gap(documents) * (len(documents) - 1)

    def pack(self, documents: Iterable[Tokens], most: int) -> Packed:
        """As many whole samples as the documents fill, up to `most`."""
        ids: list[int] = []
        answers: list[bool] = []
        spans: list[tuple[int, int, str]] = []
        masked = False
        for document in documents:
            if ids and self.eos is not None:
                ids.append(self.eos)
                answers.append(False)
            spans.append((len(ids), len(ids) + len(document.ids), document.hash))
            ids += document.ids
            answers += document.answers or [False] * len(document.ids)
            masked = masked or document.answers is not None
        count = min(most, len(ids) // self.body)
        held: list[list[str]] = [[] for _ in range(count)]
        for start, end, name in spans:
            for i in range(start // self.body, min(count, (end - 1) // self.body + 1)):
                held[i].append(name)
        mask = self._samples(answers, count, False) if masked else None
        return Packed(self._samples(ids, count, self.prefix), mask, tuple(tuple(names) for names in held))

    def _gap(self, before: Sequence[Tokens]) -> int:
        return int(bool(before) and self.eos is not None)

    def _samples(self, values: Sequence[int], count: int, head: int | None) -> Tensor:
        samples = torch.tensor(values[: count * self.body]).view(count, self.body)
        if self.prefix is None:
            return samples
        return torch.cat([torch.tensor(head, dtype=samples.dtype).expand(count, 1), samples], dim=1)


def prefix_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that stands at the head of a text: the tokenizer's own prefix, else its BOS, else its EOS token."""
    whole = tokenizer("a")["input_ids"]
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    if whole[:1] != plain[:1]:
        return whole[0]
    return tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id


def tokenised(
    texts: Iterator[str], tokenizer: PreTrainedTokenizerBase, answers: bool = False, at_once: int = DOCUMENTS_PER_CALL
) -> Iterator[Tokens]:
    """The documents that have any tokens.

    Args:
        texts: Documents.
        tokenizer: The model's own; a fast one where answers are asked for.
        answers: Whether to say which tokens belong to an answer.
        at_once: Documents per call of the tokenizer; so many may be read in vain.
    """
    while batch := list(islice(texts, at_once)):
        encoded = tokenizer(batch, add_special_tokens=False, verbose=False, return_offsets_mapping=answers)
        for i, text in enumerate(batch):
            if ids := encoded["input_ids"][i]:
                marks = _answers(text, encoded["offset_mapping"][i]) if answers else None
                yield Tokens(ids, marks, document_hash(text))


def _answers(text: str, offsets: Sequence[tuple[int, int]]) -> list[bool]:
    inside = torch.zeros(len(text) + 1, dtype=torch.bool)
    for start, end in text.answers if isinstance(text, Document) else ():
        inside[start:end] = True
    # A token counts if its last character does: the space before an answer's first word belongs to that word.
    return [bool(end > start and inside[end - 1]) for start, end in offsets]
