"""Make batches for a student with a trimmed vocabulary: each sample in the tokens of student and teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby, pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from ..measure.kl import divergence
from ..measure.predictions import Predictions
from ..vocabulary.token_alignment import AlignedChunk, TokenAlignment


IGNORED = -100
# A sample: lists by name, in the tokens of the student and of the teacher. The two texts may have different lengths.
Sample = dict[str, list[int]]


def align_document(
    alignment: TokenAlignment, ids: Sequence[int], is_counted: Sequence[bool], first_position: int = 0
) -> Sample:
    """Spell a document in the tokens of the teacher and of the student.

    Args:
        alignment: The spelling of the teacher's tokens.
        ids: The document in the teacher's tokens.
        is_counted: Whether each token counts in the loss.
        first_position: The position of the first token.

    Returns:
        `input_ids`, `labels` and `position_ids` in the student's tokens. `align_rows` and `align_nodes`, the `row` and
        the `node` of each student token; see `AlignedToken`. `teacher_input_ids`, `teacher_labels` and
        `teacher_position_ids` in the teacher's tokens.
    """
    # The first token of a document has no prediction.
    has_label = [False] + list(is_counted[1:])
    parts = alignment.align(ids, has_label)
    student_ids = [part for part, _, _ in parts]
    rows = [row for _, row, _ in parts]

    return {
        "input_ids": student_ids,
        "labels": _labels(student_ids, [row >= 0 for row in rows]),
        "position_ids": list(range(first_position, first_position + len(student_ids))),
        "align_rows": rows,
        "align_nodes": [node for _, _, node in parts],
        "teacher_input_ids": list(ids),
        "teacher_labels": _labels(ids, has_label),
        "teacher_position_ids": list(range(first_position, first_position + len(ids))),
    }


def _labels(ids: Sequence[int], has_label: Sequence[bool]) -> list[int]:
    """Return the ids, with `IGNORED` for tokens without a label."""
    labels = list(ids)
    for place, keeps_id in enumerate(has_label):
        if not keeps_id:
            labels[place] = IGNORED
    return labels


def join_documents(documents: Sequence[Sample]) -> Sample:
    """Pack the documents of one sample. Rows are numbered through all documents."""
    sample: Sample = {name: [] for name in documents[0]}
    num_rows = 0
    for document in documents:
        for name, values in document.items():
            if name != "align_rows":
                sample[name] += values

        for row in document.get("align_rows", ()):
            if row >= 0:
                row += num_rows
            sample["align_rows"].append(row)

        num_rows += sum(label != IGNORED for label in document["teacher_labels"])
    return sample


# The values that pad shorter rows of a batch.
PADDING = {"labels": IGNORED, "teacher_labels": IGNORED, "align_rows": -1, "align_nodes": -1}


def pad_samples(samples: Sequence[Sample]) -> dict[str, Tensor]:
    """Stack samples to a batch. The values in the tokens of a model have the shape `(batch, longest)`."""
    batch: dict[str, Tensor] = {}
    for name in samples[0]:
        rows = [torch.tensor(sample[name], dtype=torch.int64) for sample in samples]
        batch[name] = pad_sequence(rows, batch_first=True, padding_value=PADDING.get(name, 0))
    return batch


class AlignedCollator:
    """A collator that adds the teacher's tokens to the batches of another collator in the student's tokens.

    The text of each document is tokenized again with the teacher's tokenizer. If the student's spelling of the result
    differs from the batch, the teacher reads the student's tokens one by one.

    Args:
        collator: The collator of the Trainer.
        alignment: The spelling of the teacher's tokens.
        teacher_tokenizer: The tokenizer of the teacher.
        tokenizer: The tokenizer of the student.
    """

    aligns_tokens = True

    def __init__(
        self,
        collator: Any,
        alignment: TokenAlignment,
        teacher_tokenizer: PreTrainedTokenizerBase | None,
        tokenizer: PreTrainedTokenizerBase | None,
    ):
        self.collator = collator
        self.alignment = alignment
        self.teacher_tokenizer = teacher_tokenizer
        self.tokenizer = tokenizer

        # The teacher's ids of the student's tokens.
        self.own_token: dict[int, int] = {}
        for token, parts in enumerate(alignment.spellings):
            if len(parts) == 1:
                self.own_token.setdefault(parts[0], token)

        self.special: set[int] = set()
        if tokenizer is not None:
            self.special.update(tokenizer.all_special_ids)

    def __getattr__(self, name: str) -> Any:
        # Trainers read settings of their collator.
        if name == "collator":
            raise AttributeError(name)
        return getattr(self.collator, name)

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the batch of the collator, with the inputs of `AlignedTargets`."""
        batch: dict[str, Any] = dict(self.collator(features))
        ids = batch["input_ids"]
        labels = batch.get("labels", ids)
        positions = batch.get("position_ids")
        mask = batch.get("attention_mask")
        if mask is None or mask.shape != ids.shape:  # a mask of packed documents has more dimensions
            mask = torch.ones_like(ids)
        is_token = mask.bool()
        # A row without tokens is read as its padding, whose labels do not count.
        is_token = is_token | ~is_token.any(-1, keepdim=True)

        samples = []
        for row in range(len(ids)):
            row_ids = ids[row][is_token[row]].tolist()
            row_labels = labels[row][is_token[row]].tolist()
            starts = None
            if positions is not None:
                starts = (positions[row][is_token[row]] == 0).tolist()
            samples.append(self._sample(row_ids, row_labels, starts))

        # The student's part of the batch has the padding of the other collator, which may be on the left.
        for name in ("labels", "align_rows", "align_nodes"):
            values = torch.full_like(ids, PADDING[name])
            for row, sample in enumerate(samples):
                values[row, is_token[row]] = torch.tensor(sample[name], dtype=values.dtype)
            batch[name] = values

        aligned = pad_samples(samples)
        for name in AlignedTargets.INPUTS:
            if name.startswith("teacher_"):
                batch[name] = aligned[name]
        return batch

    def _sample(self, ids: list[int], labels: list[int], starts: list[bool] | None) -> Sample:
        """Spell the documents of one row. A position of 0 is the start of a document."""
        bounds = []
        if starts is not None:
            bounds = [place for place, is_start in enumerate(starts) if is_start]
        # A row may begin inside a document.
        if not bounds or bounds[0] > 0:
            bounds.insert(0, 0)
        bounds.append(len(ids))

        documents = []
        for start, end in pairwise(bounds):
            documents.append(self._document(ids[start:end], labels[start:end]))
        return join_documents(documents)

    def _document(self, ids: list[int], labels: list[int]) -> Sample:
        teacher_ids = self._teacher_ids(ids)
        is_counted = []
        start = 0
        for token in teacher_ids:
            end = start + len(self.alignment.spellings[token])
            is_counted.append(all(label != IGNORED for label in labels[start:end]))
            start = end
        return align_document(self.alignment, teacher_ids, is_counted)

    def _teacher_ids(self, ids: list[int]) -> list[int]:
        """Return the teacher's tokens of a text. Their spelling is exactly `ids`."""
        tokens: list[int] = []
        for is_special, group in groupby(ids, self.special.__contains__):
            run = list(group)
            if is_special:
                tokens += [self.own_token[token] for token in run]
            else:
                tokens += self._run(run)
        return tokens

    def _run(self, ids: list[int]) -> list[int]:
        """Tokenize a run of text without special tokens again."""
        own_tokens = [self.own_token[token] for token in ids]
        if self.tokenizer is None or self.teacher_tokenizer is None:
            return own_tokens

        text = self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        tokens = self.teacher_tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        spelling: list[int] = []
        for token in tokens:
            spelling += self.alignment.spellings[token]
        if spelling != ids:
            return own_tokens
        return list(tokens)


@dataclass
class AlignedTargets:
    """The positions of a batch where a student with fewer tokens learns from the predictions of the teacher.

    Attributes:
        teacher_inputs: The batch in the teacher's tokens.
        teacher_positions: The indices of the positions whose next token counts, in the teacher's flattened batch.
        rows: For each counted position of the student, the number of the teacher's token, shape `(positions,)`.
        nodes: For each counted position, the node of its next token; see `TokenAlignment.align`.
        chunks: The positions in chunks; see `split`.
    """

    INPUTS: ClassVar[tuple[str, ...]] = (
        "align_rows",
        "align_nodes",
        "teacher_input_ids",
        "teacher_labels",
        "teacher_position_ids",
    )

    teacher_inputs: dict[str, Tensor]
    teacher_positions: Tensor
    rows: Tensor
    nodes: Tensor
    chunks: list[AlignedChunk] = field(default_factory=list)

    @classmethod
    def of(cls, inputs: Mapping[str, Any], positions: Tensor) -> AlignedTargets:
        """Select the counted positions of a batch.

        Args:
            inputs: A batch of `AlignedCollator`.
            positions: The indices of the student's counted positions in the flattened batch.
        """
        labels = inputs["teacher_labels"]
        next_counts = labels[:, 1:] != IGNORED
        next_counts = torch.cat([next_counts, torch.zeros_like(next_counts[:, :1])], dim=1)

        # Rows are numbered within each sample, because processes cut a batch into parts.
        rows_of_sample = next_counts.sum(1)
        first_rows = rows_of_sample.cumsum(0) - rows_of_sample
        rows = inputs["align_rows"] + first_rows[:, None]
        rows = rows[:, 1:].reshape(-1)
        nodes = inputs["align_nodes"][:, 1:].reshape(-1)

        # A position predicts the token after it. The last position of a sample has no prediction.
        length = inputs["align_rows"].shape[1]
        places = positions - positions // length
        teacher_inputs = {
            "input_ids": inputs["teacher_input_ids"],
            "position_ids": inputs["teacher_position_ids"],
        }
        return cls(teacher_inputs, next_counts.flatten().nonzero()[:, 0], rows[places], nodes[places])

    def split(self, alignment: TokenAlignment, size: int, device: torch.device) -> None:
        """Divide the positions into chunks of `size` positions, on the device of the student's logits."""
        if len(self.rows):
            _, self.chunks = alignment.chunks(self.rows, self.nodes, size, device)

    def divergence(
        self, alignment: TokenAlignment, logits: Tensor, predictions: Predictions, temperature: float, number: int
    ) -> Tensor:
        """Return the KL divergence from teacher to student in nats for one chunk, shape `(positions,)`, fp32.

        Args:
            alignment: The spelling of the teacher's tokens.
            logits: The student's logits of the next tokens, shape `(positions, size)`.
            predictions: The teacher's predictions of its counted tokens.
            temperature: The temperature of both distributions.
            number: The number of the chunk.
        """
        if not len(logits):
            return logits.sum(-1)

        chunk = self.chunks[number]
        with torch.no_grad():
            teacher = predictions.logits(chunk.dense.start, chunk.dense.stop, logits.device)
        return divergence(logits, teacher, temperature, partial(alignment.next_part, chunk=chunk))
