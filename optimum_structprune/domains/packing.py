"""Pack documents into token samples of equal length, and decode samples to text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import chain, islice

import torch
from tokenizers.models import Unigram
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..config.domains import DomainConfig
from ..system.errors import StructPruneError, one_line
from .templates import chat_text


# The role of a document. A document has one role in all domains, and in all earlier runs of a model.
HELDOUT = "held out"
USED = "used"
PROBE = "probe"
# After this number of documents with another role in a row, a stream counts as exhausted, because it may be endless.
MAX_SKIPPED_DOCUMENTS = 10_000
# A letter of Egyptian hieroglyphs, which most tokenizers do not know.
RARE_CHARACTER = "\U00013000"


@dataclass(frozen=True)
class Tokens:
    """A document as token ids, with the SHA-256 hash of its text."""

    ids: list[int]
    hash: str


@dataclass(frozen=True)
class SampleFormat:
    """Describe how documents are packed into samples.

    Attributes:
        seq_length: The number of tokens in a sample.
        prefix: The first token of each sample; None if the tokenizer has none.
        eos: The token between two documents; None if the tokenizer has none.
    """

    seq_length: int
    prefix: int | None
    eos: int | None

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, seq_length: int) -> SampleFormat:
        """Return the format of a tokenizer's samples, or raise if `seq_length` is below 2."""
        if seq_length < 2:
            raise StructPruneError(f"`seq_length` must be at least 2, got {seq_length}.")
        return cls(seq_length, prefix_token(tokenizer), tokenizer.eos_token_id)

    @property
    def body(self) -> int:
        """Return the number of tokens of text in a sample, without the prefix."""
        if self.prefix is None:
            return self.seq_length
        return self.seq_length - 1

    @property
    def separator_length(self) -> int:
        """Return the number of tokens between two documents."""
        if self.eos is None:
            return 0
        return 1

    def take(self, tokenized_texts: Iterator[Tokens], num_tokens: int) -> list[Tokens]:
        """Take documents until they have at least `num_tokens` tokens, or until the stream is exhausted."""
        documents: list[Tokens] = []
        length = 0

        while length < num_tokens:
            document = next(tokenized_texts, None)
            if document is None:
                break

            if documents:
                length += self.separator_length
            length += len(document.ids)
            documents.append(document)

        return documents

    def length(self, documents: Sequence[Tokens]) -> int:
        """Return the number of tokens in documents, including the separators between them."""
        separators = max(len(documents) - 1, 0) * self.separator_length
        return separators + sum(len(document.ids) for document in documents)

    def pack(self, documents: Iterable[Tokens], max_samples: int) -> tuple[Tensor, tuple[str, ...]]:
        """Cut documents into full samples.

        Returns:
            The samples, shape `(at most max_samples, seq_length)`, and the hashes of the documents in them.
        """
        ids: list[int] = []
        starts: list[tuple[int, str]] = []

        for document in documents:
            if ids and self.eos is not None:
                ids.append(self.eos)
            starts.append((len(ids), document.hash))
            ids += document.ids

        num_samples = min(max_samples, len(ids) // self.body)
        num_tokens = num_samples * self.body
        samples = torch.tensor(ids[:num_tokens], dtype=torch.int64).view(num_samples, self.body)

        if self.prefix is not None:
            prefixes = samples.new_full((num_samples, 1), self.prefix)
            samples = torch.cat([prefixes, samples], dim=1)

        # A dictionary keeps the order and removes repetitions.
        hashes = dict.fromkeys(text_hash for start, text_hash in starts if start < num_tokens)
        return samples, tuple(hashes)


class DocumentPool:
    """The documents of one domain. Each document has one role.

    Attributes:
        documents: The documents that have been read from the stream.
    """

    def __init__(self, stream: Iterable[Tokens]):
        self.documents: list[Tokens] = []
        self._set_aside: set[str] = set()
        self._remaining = self._recorded(stream)

    def take(
        self, frame: SampleFormat, num_tokens: int, role: str, roles: dict[str, str], max_length: int | None = None
    ) -> list[Tokens]:
        """Take documents for one role.

        Args:
            frame: The format of the samples.
            num_tokens: The number of tokens to take.
            role: The role of the documents.
            roles: The roles of documents by their hashes. The taken documents are added.
            max_length: Documents are cut to this number of tokens.
        """
        skipped: list[Tokens] = []
        available = self._available(role, roles, skipped)
        shortened = (Tokens(document.ids[:max_length], document.hash) for document in available)
        documents = frame.take(shortened, num_tokens)

        # Another role may use the skipped documents.
        self._remaining = chain(skipped, self._remaining)
        return documents

    def _available(self, role: str, roles: dict[str, str], skipped: list[Tokens]) -> Iterator[Tokens]:
        """Yield documents that have a role or no role yet, and add all other documents to `skipped`."""
        num_skipped_in_a_row = 0

        for document in self._remaining:
            has_role = roles.setdefault(document.hash, role) == role

            if has_role and document.hash not in self._set_aside:
                num_skipped_in_a_row = 0
                if role != USED:
                    self._set_aside.add(document.hash)
                yield document
                continue

            skipped.append(document)
            num_skipped_in_a_row += 1
            if num_skipped_in_a_row == MAX_SKIPPED_DOCUMENTS:
                return

    def _recorded(self, stream: Iterable[Tokens]) -> Iterator[Tokens]:
        """Yield the documents of a stream, and record them."""
        for document in stream:
            self.documents.append(document)
            yield document


def check_reads_any_text(tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Raise `StructPruneError` if a Unigram tokenizer fails at a character that it does not know."""
    if tokenizer is None or not tokenizer.is_fast or not isinstance(tokenizer.backend_tokenizer.model, Unigram):
        return

    # The library raises an exception without a class of its own.
    try:
        tokenizer(RARE_CHARACTER)
    except Exception as error:
        raise StructPruneError(
            f"The tokenizer cannot read all text, because its Unigram model has no unknown token: {one_line(error)}. "
            "Set `unk_id` in the `model` of its tokenizer.json to the id of a token, such as <unk>."
        ) from error


def prefix_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the first token of a text: the tokenizer's own, else its BOS, else its EOS, else None."""
    ids = tokenizer("a")["input_ids"]
    plain_ids = tokenizer("a", add_special_tokens=False)["input_ids"]

    if ids[:1] != plain_ids[:1]:
        return ids[0]
    if tokenizer.bos_token_id is not None:
        return tokenizer.bos_token_id
    return tokenizer.eos_token_id


def tokenize_with_prefix(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens of a text after the prefix."""
    ids = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    prefix = prefix_token(tokenizer)
    if prefix is not None:
        ids.insert(0, prefix)
    return ids


def prompt_ids(messages: Sequence[Mapping[str, str]], opening: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens of messages in the chat template, or of an opening if the tokenizer has no template."""
    if not tokenizer.chat_template:
        return tokenize_with_prefix(opening, tokenizer)

    text = chat_text(tokenizer, messages, add_generation_prompt=True, enable_thinking=False)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def tokenised(texts: Iterator[str], tokenizer: PreTrainedTokenizerBase, batch_size: int = 32) -> Iterator[Tokens]:
    """Yield the tokens of documents. Documents without tokens are skipped.

    The prefix that some chat templates write is left out, because each sample begins with it.
    """
    prefix = prefix_token(tokenizer)
    batch = list(islice(texts, batch_size))

    while batch:
        encoded = tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]

        for text, ids in zip(batch, encoded, strict=True):
            if ids[:1] == [prefix]:
                ids = ids[1:]
            if ids:
                yield Tokens(ids, document_hash(text))

        batch = list(islice(texts, batch_size))


@dataclass(frozen=True)
class Domain:
    """A calibration domain as token ids. Each document has one role, in all domains.

    Attributes:
        name: The name.
        weight: The share of this domain.
        samples: The samples for calibration, shape `(samples, seq_length)`.
        heldout: The samples for the report.
        origin: The config of the domain; None for inputs of a program.
        documents: The hashes of the documents in `samples`.
        heldout_documents: The hashes of the documents in `heldout`.
        probe: The samples for choices; None if there are none.
        probe_documents: The hashes of the documents in `probe`.
    """

    name: str
    weight: float
    samples: Tensor
    heldout: Tensor
    origin: DomainConfig | None = None
    documents: tuple[str, ...] = ()
    heldout_documents: tuple[str, ...] = ()
    probe: Tensor | None = None
    probe_documents: tuple[str, ...] = ()

    @property
    def probe_or_heldout(self) -> Tensor:
        """Return the samples for choices, shape `(samples, seq_length)`, by default the held-out samples."""
        if self.probe is None:
            return self.heldout
        return self.probe


def document_numbers(samples: Tensor, eos: int | None) -> Tensor:
    """Return the number of the document of each token, shape `(samples, seq_length)`.

    Documents end at EOS tokens. Without an EOS token, each sample is one document.
    """
    if eos is None:
        return torch.arange(len(samples))[:, None].expand_as(samples)

    ends = samples[:, 1:] == eos
    numbers = ends.flatten().cumsum(0).view_as(ends)
    return torch.cat([numbers[:, :1], numbers], 1)


def document_hash(text: str) -> str:
    """Return the SHA-256 hash of a text in UTF-8, in hexadecimal digits."""
    return sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def check_vocabulary(max_id: int, vocab_size: int | None) -> None:
    """Raise `StructPruneError` if a token id is not in the vocabulary of a model."""
    if vocab_size is not None and max_id >= vocab_size:
        raise StructPruneError(
            f"The tokenizer does not belong to this model: token id {max_id}, vocabulary {vocab_size}. If the model "
            "lacks rows for new tokens, model.resize_token_embeddings(len(tokenizer)) adds them."
        )
