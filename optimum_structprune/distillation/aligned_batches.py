"""Make batches for a student with a trimmed vocabulary: each sample in the tokens of student and teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby, pairwise
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..measure.batches import IGNORED, PADDING, AlignedTargets, Sample, aligned_sample, pad_samples
from ..system.errors import StructPruneError
from ..vocabulary.token_alignment import TokenAlignment


def check_batch(batch: Any) -> None:
    """Raise `StructPruneError` if a batch lacks the inputs that a loss of next tokens needs."""
    for name in ("input_ids", "labels"):
        if not isinstance(batch, Mapping) or batch.get(name) is None:
            raise StructPruneError(
                f"The batches of the Trainer have no `{name}`, which `attach_teacher` needs. Pass a `data_collator` "
                "that returns both, such as `DataCollatorForLanguageModeling(tokenizer, mlm=False)`."
            )


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
        batch: Any = self.collator(features)
        check_batch(batch)
        batch = dict(batch)
        ids = batch["input_ids"]
        labels = batch["labels"]
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

        sample: Sample = {"input_ids": [], "labels": [], "position_ids": []}
        for start, end in pairwise(bounds):
            teacher_ids = self._teacher_ids(ids[start:end])
            sample["input_ids"] += teacher_ids
            sample["position_ids"] += range(len(teacher_ids))

            part_start = start
            for token in teacher_ids:
                part_end = part_start + len(self.alignment.spellings[token])
                counts = all(label != IGNORED for label in labels[part_start:part_end])
                sample["labels"].append(token if counts else IGNORED)
                part_start = part_end
        return aligned_sample(sample, self.alignment)

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
