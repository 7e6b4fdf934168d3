"""Documents to token samples of equal length, and back to text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import chain, islice, pairwise
from math import log, nan

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..arch.meta import positions_of
from ..config.domains import DomainConfig
from ..errors import StructPruneError
from .templates import chat_text


# What a document is for: one thing, in all domains and in all runs that a model comes from.
HELDOUT, USED, PROBE = "held out", "used", "probe"
MAX_PASSED_DOCUMENTS = 10_000  # in a row that are for something else, as a text may repeat itself forever


@dataclass(frozen=True)
class Tokens:
    """A document as token ids, and the SHA-256 of its text."""

    ids: list[int]
    hash: str


@dataclass(frozen=True)
class SampleFormat:
    """The length of a sample, the token at its head, and the one between two documents, if any."""

    seq_length: int
    prefix: int | None
    eos: int | None

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, seq_length: int) -> SampleFormat:
        """Gives the format of a tokenizer's samples. A length that leaves nothing to predict is refused."""
        if seq_length < 2:
            raise StructPruneError(f"seq_length={seq_length} leaves nothing to predict; 2 is the least.")
        return cls(seq_length, prefix_token(tokenizer), tokenizer.eos_token_id)

    @property
    def body(self) -> int:
        """Counts the tokens of text in a sample: all but the prefix."""
        return self.seq_length - (self.prefix is not None)

    def take(self, tokenised: Iterator[Tokens], need: int) -> list[Tokens]:
        """Take documents until they have `need` tokens or more, or there are no others."""
        taken: list[Tokens] = []
        have, gap = 0, int(self.eos is not None)
        while have < need and (document := next(tokenised, None)) is not None:
            have += len(document.ids) + gap * bool(taken)
            taken.append(document)
        return taken

    def length(self, documents: Sequence[Tokens]) -> int:
        """Counts the tokens in documents, those between two of them included."""
        between = max(len(documents) - 1, 0) * (self.eos is not None)
        return sum(len(document.ids) for document in documents) + between

    def pack(self, documents: Iterable[Tokens], most: int) -> tuple[Tensor, tuple[str, ...]]:
        """Cut documents into full samples, `(at most so many, seq_length)`, and give the hashes in them."""
        ids: list[int] = []
        starts: list[tuple[int, str]] = []
        for document in documents:
            if ids and self.eos is not None:
                ids.append(self.eos)
            starts.append((len(ids), document.hash))
            ids += document.ids
        count = min(most, len(ids) // self.body)
        used = dict.fromkeys(name for start, name in starts if start < count * self.body)
        samples = torch.tensor(ids[: count * self.body], dtype=torch.int64).view(count, self.body)
        if self.prefix is not None:
            samples = torch.cat([samples.new_full((count, 1), self.prefix), samples], dim=1)
        return samples, tuple(used)


class DocumentPool:
    """The documents of one domain, each for one use; `read` are all that have been looked at."""

    def __init__(self, stream: Iterable[Tokens]):
        self.read: list[Tokens] = []
        self._aside: set[str] = set()
        self._rest = self._noted(stream)

    def take(
        self, frame: SampleFormat, need: int, use: str, uses: dict[str, str], longest: int | None = None
    ) -> list[Tokens]:
        """Gives documents with `need` tokens for one use, each once, cut to `longest`; `uses` by hash grows."""
        passed: list[Tokens] = []
        cut = (Tokens(text.ids[:longest], text.hash) for text in self._free(use, uses, passed))
        taken = frame.take(cut, need)
        self._rest = chain(passed, self._rest)
        return taken

    def _free(self, use: str, uses: dict[str, str], passed: list[Tokens]) -> Iterator[Tokens]:
        missed = 0
        for document in self._rest:
            if uses.setdefault(document.hash, use) == use and document.hash not in self._aside:
                missed = 0
                self._aside |= {document.hash} if use != USED else set()
                yield document
            else:
                missed += 1
                passed.append(document)
                if missed == MAX_PASSED_DOCUMENTS:
                    return

    def _noted(self, stream: Iterable[Tokens]) -> Iterator[Tokens]:
        for document in stream:
            self.read.append(document)
            yield document


def prefix_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Finds the token at the head of a text: the tokenizer's own, else its BOS, else its EOS, if any."""
    special = tokenizer("a")["input_ids"]
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    if special[:1] != plain[:1]:
        return special[0]
    return tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id


def tokenize_with_prefix(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Gives the tokens of a text behind that at its head."""
    prefix, ids = prefix_token(tokenizer), tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids if prefix is None else [prefix, *ids]


def prompt_ids(messages: Sequence[Mapping[str, str]], opening: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Gives the tokens of a prompt: messages in the chat template, or an opening where there is none."""
    if not tokenizer.chat_template:
        return tokenize_with_prefix(opening, tokenizer)
    text = chat_text(tokenizer, messages, add_generation_prompt=True, enable_thinking=False)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def tokenised(texts: Iterator[str], tokenizer: PreTrainedTokenizerBase, at_once: int = 32) -> Iterator[Tokens]:
    """Gives the tokens of documents. One that has none is left out."""
    while batch := list(islice(texts, at_once)):
        encoded = tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]
        yield from (Tokens(ids, document_hash(text)) for ids, text in zip(encoded, batch, strict=True) if ids)


@dataclass(frozen=True)
class Domain:
    """A calibration domain as token ids. Each document has one use, in all domains.

    Attributes:
        weight: The domain's share of all domains.
        samples, heldout, probe: Samples that calibrate, that the report measures, and that choices are made on, each
            of shape `(samples, seq_length)`.
        origin: The config of the domain; None for inputs that were given.
        documents, heldout_documents, probe_documents: The hashes of the documents of each use.
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
        """Gives the samples that a choice is made on, shape `(samples, seq_length)`."""
        return self.heldout if self.probe is None else self.probe


def document_numbers(samples: Tensor, eos: int | None) -> Tensor:
    """Numbers the document of each token, shape `(samples, seq_length)`; without EOS, each sample is one."""
    if eos is None:
        return torch.arange(len(samples))[:, None].expand_as(samples)
    ends = samples[:, 1:] == eos
    numbers = ends.flatten().cumsum(0).view_as(ends)
    return torch.cat([numbers[:, :1], numbers], 1)


def document_hash(text: str) -> str:
    """Hashes a text in UTF-8 by SHA-256, in hexadecimal digits."""
    return sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def check_vocabulary(largest: int, vocab_size: int | None) -> None:
    """Refuse token ids that a model does not have."""
    if vocab_size is not None and largest >= vocab_size:
        raise StructPruneError(
            f"The tokenizer does not belong to this model: token id {largest}, vocabulary {vocab_size}. If the model "
            "lacks rows for new tokens, model.resize_token_embeddings(len(tokenizer)) adds them."
        )


class Passages:
    """The text of samples of token ids, each of shape `(seq_length,)`, and its `bytes`.

    The first token of a sample is context only, and left out. So is a character that the edge of a sample cuts in two.
    """

    def __init__(self, samples: Sequence[Tensor], tokenizer: PreTrainedTokenizerBase):
        self.seq_length = len(samples[0])
        self.texts = [_documents(ids[1:].tolist(), tokenizer) for ids in samples]
        self.bytes = sum(len(text.encode()) for texts in self.texts for text in texts)

    def bits_per_byte(self, losses: Tensor) -> float:
        """Gives the bits per byte of the samples, from the total loss of each in nats, shape `(samples,)`."""
        return float(losses.mean()) * len(self.texts) / log(2) / self.bytes if self.bytes else nan

    def rows(self, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> list[Tensor]:
        """Spells the samples as ids of another tokenizer in packed text, each of shape `(tokens,)`."""
        prefix, eos = prefix_token(tokenizer), tokenizer.eos_token_id
        if prefix is None:
            raise StructPruneError(
                f"{type(tokenizer).__name__} has neither a BOS nor an EOS token to begin a text; set its eos_token."
            )
        every = [text for texts in self.texts for text in texts]
        encoded = iter(tokenizer(every, add_special_tokens=False, verbose=False)["input_ids"])
        rows = []
        for texts in self.texts:
            ids = [prefix, *next(encoded)]
            for _ in texts[1:]:
                ids += [*([] if eos is None else [eos]), *next(encoded)]
            rows.append(torch.tensor(ids))
        most, longest = max(map(len, rows)), positions_of(model)
        check_vocabulary(max(int(row.max()) for row in rows), model.config.get_text_config().vocab_size)
        if most > longest:
            raise StructPruneError(
                f"A sample of seq_length={self.seq_length} takes {most} tokens of the model's own tokenizer, and the "
                f"model has {longest} positions; try seq_length={self.seq_length * longest // most}."
            )
        return rows


def _documents(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    # The documents of a sample lie between EOS tokens.
    ends = [-1, *(place for place, token in enumerate(ids) if token == tokenizer.eos_token_id), len(ids)]
    parts = [ids[before + 1 : end] for before, end in pairwise(ends)]
    texts = [str(tokenizer.decode(part, clean_up_tokenization_spaces=False)) for part in parts]
    texts[0] = texts[0].lstrip("\ufffd")
    texts[-1] = texts[-1].rstrip("\ufffd")
    return texts
