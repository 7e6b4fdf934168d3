"""Text that measures models: rows of token ids, which any tokenizer can encode again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from math import inf, log, nan

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..domains.packing import check_vocabulary, document_numbers, prefix_token
from ..system.errors import StructPruneError
from ..system.margins import MANY_DOCUMENTS
from .batches import Sample


# The tokens in a short row. With a shorter context, tokens are hard to predict.
ROW = 64


@dataclass(frozen=True, eq=False)
class Text:
    """Rows of token ids.

    Attributes:
        rows: The token ids of each row, shape `(tokens,)`. The first token of a row is context only.
        documents: The number of the document of each row, shape `(rows,)`. By default each row is a document.
        tokenizer: The tokenizer of the ids; None if it is unknown.
        labels: The tokens that count, by row, shape `(tokens,)`, with `IGNORED` elsewhere. By default all count.
            If the text `has_gaps`, the label of each position is the token that a model predicts there, or the tokens
            of its decoder.
        positions: The position of each token in its document, by row, shape `(tokens,)`, if rows have several
            documents that do not see each other.
        has_gaps: Whether models fill gaps, and do not predict the next token.
        original: The text before another tokenizer has encoded it.
    """

    rows: Sequence[Tensor]
    documents: Tensor | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    labels: Sequence[Tensor] | None = None
    positions: Sequence[Tensor] | None = None
    has_gaps: bool = False
    original: Text | None = None

    @classmethod
    def of(cls, samples: Tensor, tokenizer: PreTrainedTokenizerBase | None) -> Text:
        """Return samples of token ids, shape `(samples, seq_length)`, as text."""
        documents = document_numbers(samples, _eos(tokenizer))[:, 0]
        return cls(list(samples), documents, tokenizer)

    @classmethod
    def short(cls, samples: Tensor, tokenizer: PreTrainedTokenizerBase | None, tokens: int) -> Text:
        """Cut short rows from samples, from as many documents as possible.

        The confidence interval is over documents, so there are at least 12 rows. Each row begins with the first token
        of its sample.

        Args:
            samples: Token ids, shape `(samples, seq_length)`; documents end with an EOS token.
            tokenizer: The tokenizer of the ids.
            tokens: The approximate number of tokens of all rows.
        """
        length = min(ROW, samples.shape[1])
        starts = range(1, samples.shape[1] - length + 2, length - 1)

        rows = []
        documents = []
        for sample, numbers in zip(samples, document_numbers(samples, _eos(tokenizer)), strict=True):
            for start in starts:
                rows.append(torch.cat([sample[:1], sample[start : start + length - 1]]))
                documents.append(int(numbers[start]))

        # Take the first row of every document, then the second row of every document, and so on.
        rows_of_document: Counter[int] = Counter()
        ranks = []
        for document in documents:
            ranks.append(rows_of_document[document])
            rows_of_document[document] += 1

        count = max(tokens // length, MANY_DOCUMENTS)
        by_rank = sorted(range(len(rows)), key=ranks.__getitem__)
        chosen = sorted(by_rank[:count])
        return cls([rows[place] for place in chosen], torch.tensor(documents)[chosen], tokenizer)

    @property
    def tokens(self) -> Tensor:
        """Return the number of predicted tokens of each row before another tokenizer has encoded it, `(rows,)`."""
        text = self.original or self
        return torch.tensor([len(row) - 1 for row in text.rows])

    def sample(self, number: int) -> Sample:
        """Return a row as a sample."""
        ids = self.rows[number].tolist()
        sample = {"input_ids": ids, "labels": ids}
        if self.labels is not None:
            sample["labels"] = self.labels[number].tolist()
        if self.positions is not None:
            sample["position_ids"] = self.positions[number].tolist()
        return sample

    def parts(self, numbers: Sequence[int], tokens: int) -> list[list[int]]:
        """Divide the numbers of rows into batches of at most `tokens` tokens. Similar lengths run together."""
        sizes = [(len(row), 0) for row in self.rows]
        if self.labels is not None:
            sizes = [(len(row), len(labels)) for row, labels in zip(self.rows, self.labels, strict=True)]

        parts: list[list[int]] = []
        for number in sorted(numbers, key=sizes.__getitem__):
            # A model that fills gaps also sees padding.
            is_full = not parts or max(sizes[number]) * (len(parts[-1]) + 1) > tokens
            if is_full or (self.has_gaps and sizes[parts[-1][0]] != sizes[number]):
                parts.append([])
            parts[-1].append(number)
        return parts

    @cached_property
    def strings(self) -> list[list[str]]:
        """Return the strings of the documents in each row, without the first token.

        A character that the edge of a row divides is left out.
        """
        if self.original is not None:
            return self.original.strings
        assert self.tokenizer is not None
        return [_document_strings(row[1:].tolist(), self.tokenizer) for row in self.rows]

    @property
    def bytes(self) -> int:
        """Return the number of bytes of all strings."""
        return sum(len("".join(strings).encode()) for strings in self.strings)

    def bits_per_byte(self, losses: Tensor) -> float:
        """Return the bits per byte, from the total loss of each row in nats, shape `(rows,)`."""
        if not self.bytes:
            return nan
        return float(losses.mean()) * len(self.rows) / log(2) / self.bytes

    def for_tokenizer(self, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> Text:
        """Return the same text in the tokens of another tokenizer.

        Args:
            tokenizer: The tokenizer.
            model: The model that will read the text.

        Raises:
            StructPruneError: If the tokenizer has no token to begin a text or does not belong to the model.
        """
        prefix = prefix_token(tokenizer)
        if prefix is None:
            raise StructPruneError(
                f"{type(tokenizer).__name__} has neither a BOS nor an EOS token to begin a text. Set its `eos_token`."
            )

        rows = [torch.tensor([prefix] + ids) for ids in _joined_ids(self.strings, tokenizer)]
        check_vocabulary(max(int(row.max()) for row in rows), model.config.get_text_config().vocab_size)
        return Text(rows, self.documents, tokenizer, original=self.original or self)

    def cut(self, positions: float, tokenizer: PreTrainedTokenizerBase | None = None) -> Text:
        """Cut rows of equal length so that a model has enough positions for the text in other tokens.

        Args:
            positions: The number of positions of the model.
            tokenizer: The other tokenizer. None stands for any tokenizer.

        Raises:
            StructPruneError: If the model has too few positions for one token.
        """
        text = self
        while positions < inf:
            longest = text._longest_row(tokenizer)
            if longest <= positions:
                break

            length = int(len(text.rows[0]) * positions // longest)
            if length < 2:
                raise StructPruneError(
                    f"The model has {positions:.0f} positions, which are too few for text with fewer kinds of tokens."
                )
            text = replace(text, rows=[row[:length] for row in text.rows])
        return text

    def _longest_row(self, tokenizer: PreTrainedTokenizerBase | None) -> int:
        """Return the number of tokens of the longest row, with a tokenizer or with any tokenizer.

        No tokenizer has more tokens than bytes, a mark at the beginning of each document, and an EOS token after it.
        """
        if tokenizer is not None:
            return 1 + max(map(len, _joined_ids(self.strings, tokenizer)))
        return 1 + max(sum(len(string.encode()) + 2 for string in strings) for strings in self.strings)


def _eos(tokenizer: PreTrainedTokenizerBase | None) -> int | None:
    """Return the token that ends a document."""
    return None if tokenizer is None else tokenizer.eos_token_id


def _joined_ids(strings: Sequence[Sequence[str]], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    """Yield the ids of each row, with an EOS token between two documents."""
    separator = []
    if tokenizer.eos_token_id is not None:
        separator.append(tokenizer.eos_token_id)

    documents = list(chain.from_iterable(strings))
    encoded = iter(tokenizer(documents, add_special_tokens=False, verbose=False)["input_ids"])

    for row_strings in strings:
        ids: list[int] = []
        for number in range(len(row_strings)):
            if number > 0:
                ids += separator
            ids += next(encoded)
        yield ids


def _document_strings(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the strings of the documents in a row, which EOS tokens separate."""
    ends = [position for position, token in enumerate(ids) if token == tokenizer.eos_token_id]
    ends.append(len(ids))
    strings = []
    start = 0

    for end in ends:
        strings.append(str(tokenizer.decode(ids[start:end], clean_up_tokenization_spaces=False)))
        start = end + 1

    # The edges of a row may divide a character.
    strings[0] = strings[0].lstrip("\ufffd")
    strings[-1] = strings[-1].rstrip("\ufffd")
    return strings
