"""Make training samples of token ids, positions and labels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from ..measure.batches import IGNORED, Sample


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
