"""Make training samples of token ids, positions and labels, and batches of samples."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..errors import warn
from ..vocabulary.token_alignment import TokenAlignment
from .aligned_batches import IGNORED, align_document, join_documents, pad_samples


# `input_ids`, `position_ids` and `labels`, lists of equal length. Positions begin at 0 with each conversation, so that
# models can distinguish packed conversations. The label of a token that does not count is -100.
Sample = dict[str, list[int]]


def text_sample(ids: Sequence[int] | Tensor) -> Sample:
    """Return the sample of a text. All its tokens count in the loss."""
    if isinstance(ids, Tensor):
        ids = ids.tolist()
    tokens = list(ids)
    return {"input_ids": tokens, "position_ids": list(range(len(tokens))), "labels": list(tokens)}


@dataclass(frozen=True)
class SamplePacker:
    """A packer of prompts and answers into samples.

    Attributes:
        seq_length: The number of tokens in a sample.
        counts_prompts: Whether the tokens of prompts count in the loss too. Both models read them anyway, and the
            predictions of the teacher are as good as for any other text.
    """

    seq_length: int
    counts_prompts: bool = True

    def conversations(self, pairs: Iterable[tuple[Sequence[int], Sequence[int]]]) -> Iterator[Sample]:
        """Yield full samples of prompts and answers as token ids. The end of a conversation is cut off if needed."""
        sample: Sample = {"input_ids": [], "position_ids": [], "labels": []}
        for prompt, answer in pairs:
            ids = list(prompt) + list(answer)
            labels = [IGNORED] * len(prompt) + list(answer)
            if self.counts_prompts:
                labels[1:] = ids[1:]  # the first token has no prediction

            room = self.seq_length - len(sample["input_ids"])
            sample["input_ids"] += ids[:room]
            sample["position_ids"] += list(range(len(ids)))[:room]
            sample["labels"] += labels[:room]
            if len(sample["input_ids"]) == self.seq_length:
                yield sample
                sample = {"input_ids": [], "position_ids": [], "labels": []}


class SampleCollator:
    """A collator that makes batches in the tokens of the student and, with an alignment, of the teacher too.

    Args:
        alignment: The spelling of the teacher's tokens if the student lacks some of them.
        max_positions: The number of positions of the student.
    """

    aligns_tokens = True

    def __init__(self, alignment: TokenAlignment | None, max_positions: float):
        self.alignment = alignment
        self.max_positions = max_positions

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Return a batch of tensors, each of shape `(batch, longest)`."""
        if self.alignment is None:
            return pad_samples([dict(sample) for sample in samples])

        return pad_samples([self._aligned(sample, self.alignment) for sample in samples])

    def _aligned(self, sample: Mapping[str, Any], alignment: TokenAlignment) -> Sample:
        """Spell a sample in the student's tokens too. It is cut if the student has too few positions for them."""
        while True:
            aligned = aligned_sample(sample, alignment)
            longest = 1 + max(aligned["position_ids"])
            if longest <= self.max_positions:
                return aligned

            length = int(len(sample["input_ids"]) * self.max_positions // longest)
            sample = {name: values[:length] for name, values in sample.items()}
            warn(
                f"Samples are cut where their text has more of the kept tokens than the model has positions "
                f"({self.max_positions:.0f})."
            )


def aligned_sample(sample: Mapping[str, Any], alignment: TokenAlignment) -> Sample:
    """Spell a sample of the teacher's tokens in the student's tokens too; see `align_document`."""
    ids = sample["input_ids"]
    is_counted = [label != IGNORED for label in sample["labels"]]

    bounds = [place for place, position in enumerate(sample["position_ids"]) if position == 0]
    bounds.append(len(ids))

    documents = []
    for start, end in pairwise(bounds):
        documents.append(align_document(alignment, ids[start:end], is_counted[start:end]))
    return join_documents(documents)


def counted_tokens(sample: Mapping[str, Any]) -> int:
    """Count the tokens of a sample in the loss."""
    return sum(label != IGNORED for label in sample["labels"][1:])


def to_tensors(samples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Stack samples of equal length."""
    batch = {}
    for name in samples[0]:
        batch[name] = torch.tensor([sample[name] for sample in samples])
    return batch
