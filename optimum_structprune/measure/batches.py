"""Batches of token ids, and the predictions that count, in the tokens of one model or of two."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from math import inf
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..system.errors import warn
from ..vocabulary.token_alignment import AlignedChunk, AlignedToken, TokenAlignment
from .predictions import Predictions, StoredPredictions


# The target of a position whose next token does not count, as everywhere in torch.
IGNORED = -100
# Token ids by name: `input_ids`, `labels` with `IGNORED` for tokens that do not count, and `position_ids`, which begin
# at 0 with each document. They may be in the tokens of a model and of its teacher, whose texts differ in length.
Sample = dict[str, list[int]]


# The values that pad shorter rows of a batch.
PADDING = {"labels": IGNORED, "teacher_labels": IGNORED, "align_rows": -1, "align_nodes": -1}


def pad_samples(samples: Sequence[Sample]) -> dict[str, Tensor]:
    """Stack samples to a batch. The values in the tokens of a model have the shape `(batch, longest)`."""
    batch: dict[str, Tensor] = {}
    for name in samples[0]:
        rows = [torch.tensor(sample[name], dtype=torch.int64) for sample in samples]
        batch[name] = pad_sequence(rows, batch_first=True, padding_value=PADDING.get(name, 0))
    return batch


def aligned_sample(sample: Mapping[str, Any], alignment: TokenAlignment) -> Sample:
    """Spell a sample of the teacher's tokens in the student's tokens too.

    Args:
        sample: `input_ids` and `labels`, and `position_ids` if the sample has several documents.
        alignment: The spelling of the teacher's tokens.

    Returns:
        `input_ids`, `labels` and `position_ids` in the student's tokens. `align_rows` and `align_nodes`, the `row` and
        the `node` of each student token; see `AlignedToken`. `teacher_input_ids`, `teacher_labels` and
        `teacher_position_ids` in the teacher's tokens.
    """
    ids = sample["input_ids"]
    labels = list(sample["labels"])
    positions = list(sample.get("position_ids", range(len(ids))))
    starts = [place for place, position in enumerate(positions) if position == 0]

    parts: list[AlignedToken] = []
    student_positions: list[int] = []
    num_rows = 0
    for start, end in pairwise(starts + [len(ids)]):
        labels[start] = IGNORED  # the first token of a document has no prediction
        is_counted = [label != IGNORED for label in labels[start:end]]
        document = alignment.align(ids[start:end], is_counted, num_rows)
        num_rows += sum(is_counted)
        parts += document
        student_positions += range(len(document))

    return {
        "input_ids": [part.token for part in parts],
        "labels": [part.token if part.row >= 0 else IGNORED for part in parts],
        "position_ids": student_positions,
        "align_rows": [part.row for part in parts],
        "align_nodes": [part.node for part in parts],
        "teacher_input_ids": list(ids),
        "teacher_labels": labels,
        "teacher_position_ids": positions,
    }


class SampleCollator:
    """A collator that makes batches in the tokens of the student and, with an alignment, of the teacher too.

    Args:
        alignment: The spelling of the teacher's tokens if the student lacks some of them.
        max_positions: The number of positions of the student.
    """

    aligns_tokens = True

    def __init__(self, alignment: TokenAlignment | None, max_positions: float = inf):
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


def next_tokens(inputs: dict[str, Any]) -> Tensor:
    """Return the next token of each position of a batch, shape `(batch, seq_length)`, or -100 if it does not count."""
    if inputs.get("shift_labels") is not None:
        return inputs["shift_labels"]

    labels = inputs.get("labels")
    if labels is None:
        labels = inputs["input_ids"]
        mask = inputs.get("attention_mask")
        if mask is not None and mask.shape == labels.shape:
            labels = labels.masked_fill(mask == 0, IGNORED)

    last = torch.full_like(labels[:, :1], IGNORED)
    return torch.cat([labels[:, 1:], last], dim=1)


@dataclass
class AlignedTargets:
    """The positions of a batch where a student with fewer tokens learns from the predictions of the teacher.

    Attributes:
        alignment: The spelling of the teacher's tokens.
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

    alignment: TokenAlignment
    teacher_inputs: dict[str, Tensor]
    teacher_positions: Tensor
    rows: Tensor
    nodes: Tensor
    chunks: list[AlignedChunk] = field(default_factory=list)

    @classmethod
    def of(cls, inputs: Mapping[str, Any], positions: Tensor, alignment: TokenAlignment) -> AlignedTargets:
        """Select the counted positions of a batch.

        Args:
            inputs: A batch of `SampleCollator`.
            positions: The indices of the student's counted positions in the flattened batch.
            alignment: The spelling of the teacher's tokens.
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
        teacher_positions = next_counts.flatten().nonzero()[:, 0]
        return cls(alignment, teacher_inputs, teacher_positions, rows[places], nodes[places])

    def split(self, size: int, device: torch.device) -> None:
        """Divide the positions into chunks of `size` positions, on the device of the student's logits."""
        if len(self.rows):
            _, self.chunks = self.alignment.chunks(self.rows, self.nodes, size, device)

    def divergence(
        self, logits: Tensor, predictions: Predictions | StoredPredictions, number: int, temperature: float = 1.0
    ) -> Tensor:
        """Return the KL divergence from teacher to student in nats for one chunk, shape `(positions,)`, fp32.

        Args:
            logits: The student's logits of the next tokens, shape `(positions, size)`.
            predictions: The teacher's predictions of its counted tokens.
            number: The number of the chunk.
            temperature: The temperature of both distributions.
        """
        if not len(logits):
            return logits.sum(-1)

        chunk = self.chunks[number]
        align = partial(self.alignment.next_part, chunk=chunk)
        return predictions.divergence(logits, chunk.original.start, chunk.original.stop, temperature, align)

    @property
    def teacher_targets(self) -> Tensor:
        """Return the teacher's token after each counted position, shape `(tokens,)`."""
        return self.teacher_inputs["input_ids"].flatten()[self.teacher_positions + 1]
