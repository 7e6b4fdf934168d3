"""Make batches that a student and a teacher with other tokens both read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any


# The prefix of the teacher's inputs in a batch.
TEACHER = "teacher:"


class BothTokenizers:
    """A collator whose batches have the inputs of the student, and the inputs of the teacher with a prefix.

    Args:
        collator: The collator of the student.
        encode: A function from the rows and the student's batch to the teacher's batch.
    """

    def __init__(self, collator: Callable[[Any], Any], encode: Callable[[Any, Any], Mapping[str, Any]]):
        self.collator = collator
        self.encode = encode

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the student's collator, which Trainers read."""
        if name in ("collator", "encode"):  # of a copy that is not complete
            raise AttributeError(name)
        return getattr(self.collator, name)

    def __call__(self, rows: Sequence[Any]) -> dict[str, Any]:
        """Return a batch for both models."""
        batch = dict(self.collator(rows))
        for name, value in self.encode(rows, batch).items():
            batch[TEACHER + name] = value
        return batch


def split_inputs(inputs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the inputs of the student and the inputs of the teacher, which are empty if both read the same."""
    student: dict[str, Any] = {}
    teacher: dict[str, Any] = {}
    for name, value in inputs.items():
        if name.startswith(TEACHER):
            teacher[name.removeprefix(TEACHER)] = value
        else:
            student[name] = value
    return student, teacher


def collated(collator: Callable[[Any], Mapping[str, Any]], rows: Any, batch: Any) -> Mapping[str, Any]:
    """Return the batch of the teacher's collator, which reads texts."""
    return collator(rows)


def respelled(tokenizer: Any, teacher_tokenizer: Any, rows: Any, batch: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the texts of a batch of token ids, or its pairs of texts, in the tokens of the teacher."""
    texts: list[list[str]] = []
    for ids in batch["input_ids"].tolist():
        parts: list[list[int]] = [[]]
        for token in ids:
            if token == tokenizer.sep_token_id:
                parts.append([])
            else:
                parts[-1].append(token)
        decoded = [tokenizer.decode(part, skip_special_tokens=True) for part in parts]
        texts.append([text for text in decoded if text.strip()] or [""])

    columns = [[row[0] for row in texts]]
    if any(len(row) > 1 for row in texts):
        columns.append([row[1] if len(row) > 1 else "" for row in texts])
    encoded: Mapping[str, Any] = teacher_tokenizer(*columns, padding=True, truncation=True, return_tensors="pt")
    return encoded
