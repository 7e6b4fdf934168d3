"""Write the answers of a teacher to prompts once, cache them on the disk, and pack them into training samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from hashlib import sha256
from itertools import islice
from math import ceil
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..arch.generation import sampled_continuations
from ..arch.inference import evaluating
from ..arch.meta import positions_of
from ..measure.batches import Sample
from ..system.errors import StructPruneError, warn
from ..system.stages import progress
from ..system.stored import TextCache, line_of, read_line
from .samples import SamplePacker


# The maximum numbers of tokens in an answer. Each of them has an equal share of the samples. Short answers come first,
# because a teacher makes fewer mistakes in them.
ANSWER_TOKENS = (16, 32, 64, 128)
TEMPERATURE = 0.7
# The numbers of prompts that are answered at once. A small training needs few answers, and a large batch writes more.
MIN_PROMPTS_PER_BATCH = 4
MAX_PROMPTS_PER_BATCH = 32
# Each prompt is answered at most this number of times, because further answers teach little.
MAX_ANSWERS_PER_PROMPT = 4

# Write answers of at most `length` tokens to prompts of token ids, by a seed.
Write = Callable[[Sequence[Sequence[int]], int, int], list[list[int]]]


def writer_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Write:
    """Return a function that writes answers with a model."""

    def write(prompts: Sequence[Sequence[int]], length: int, seed: int) -> list[list[int]]:
        longest = max(len(prompt) for prompt in prompts)
        room = int(min(length, positions_of(model) - longest))
        with evaluating(model):
            return sampled_continuations(model, tokenizer, prompts, room, TEMPERATURE, seed)

    return write


def prompts_per_batch(num_tokens: int, length: int) -> int:
    """Return the number of prompts to answer at once, for `num_tokens` tokens in answers of at most `length` tokens.

    One batch has enough tokens if an answer has half of its maximum length.
    """
    prompts_needed = ceil(2 * num_tokens / length)
    return max(MIN_PROMPTS_PER_BATCH, min(MAX_PROMPTS_PER_BATCH, prompts_needed))


class AnswerFile:
    """Batches of answers in a file of JSON lines. Only the places of the batches are in memory."""

    def __init__(self, path: Path):
        self.path = path
        self._places: dict[str, int] = {}
        self._read_places()

    def _read_places(self) -> None:
        """Find the places of the intact batches in the file. The others are written again."""
        if not self.path.is_file():
            return

        place = 0

        with self.path.open("rb") as file:
            for line in file:
                with suppress(ValueError):
                    name, _ = read_line(line)
                    self._places.setdefault(name, place)
                place += len(line)

    def __contains__(self, name: str) -> bool:
        """Return whether the file has a batch of this name."""
        return name in self._places

    def read(self, name: str) -> list[list[int]]:
        """Return a batch by its name."""
        with self.path.open("rb") as file:
            file.seek(self._places[name])
            _, answers = read_line(file.readline())
        return list(answers)

    def add(self, batches: dict[str, list[list[int]]]) -> None:
        """Add batches to the file, in the first process of each machine.

        Raises:
            StructPruneError: If the file cannot be written.
        """
        state = PartialState()
        if state.is_local_main_process:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with self.path.open("a", encoding="utf-8") as file:
                    for name, answers in batches.items():
                        file.write(line_of(name, answers))
            except OSError as error:
                raise StructPruneError(
                    f"Answers cannot be kept in {self.path.parent} ({error}). Set HF_HOME to another folder."
                ) from error

        state.wait_for_everyone()
        self._places = {}
        self._read_places()


class Answers:
    """The answers of a teacher to prompts, in batches that are written when they are first needed.

    Args:
        prompts: Prompts of token ids.
        write: A function that writes answers to prompts; see `writer_of`.
        file: The file of the answers.
        seed: The seed of the answers.
        batch_size: The number of prompts that are answered at once.
    """

    def __init__(
        self, prompts: Sequence[Sequence[int]], write: Write | None, file: AnswerFile, seed: int, batch_size: int
    ):
        self.prompts = prompts
        self.write = write
        self.file = file
        self.seed = seed
        self.batch_size = batch_size

    def batch_prompts(self, length: int, number: int) -> list[Sequence[int]]:
        """Return the prompts of a batch. Each length begins at a different prompt."""
        first = ANSWER_TOKENS.index(length) * len(self.prompts) // len(ANSWER_TOKENS)
        first += number * self.batch_size
        return [self.prompts[place % len(self.prompts)] for place in range(first, first + self.batch_size)]

    def conversations(self, length: int) -> Iterator[tuple[Sequence[int], Sequence[int]]]:
        """Yield prompts and answers of at most `length` tokens, a limited number of times for each prompt."""
        share = MAX_ANSWERS_PER_PROMPT / len(ANSWER_TOKENS)
        batches = max(1, round(share * len(self.prompts) / self.batch_size))
        for number in range(batches):
            name = f"{length}/{number}"
            if name not in self.file:
                self._write(length, number)
            yield from zip(self.batch_prompts(length, number), self.file.read(name), strict=True)

    def _write(self, length: int, number: int) -> None:
        """Write the next batches, one in each process."""
        assert self.write is not None
        state = PartialState()
        mine = number + state.process_index
        name = f"{length}/{mine}"

        digest = sha256(f"{self.seed}/{name}".encode()).hexdigest()
        answers = self.write(self.batch_prompts(length, mine), length, int(digest[:12], 16))
        self.file.add(dict(gather_object([(name, answers)])))

    def samples(self, packer: SamplePacker, counts: Sequence[int]) -> Iterator[Sample]:
        """Yield packed samples. `counts` has the maximum number of samples for each length of `ANSWER_TOKENS`."""
        for length, count in zip(ANSWER_TOKENS, counts, strict=True):
            yield from islice(packer.conversations(self.conversations(length)), count)


def write_answers(answers: Answers, packer: SamplePacker, num_samples: int) -> list[int]:
    """Write the answers for `num_samples` samples, and return the number of samples by length.

    A small number of prompts has fewer samples than `num_samples`, because each prompt is answered a limited number of
    times.
    """
    counts = []
    bar = progress(range(num_samples), desc="Generating teacher answers", unit="sample")
    for index, length in enumerate(ANSWER_TOKENS):
        start = num_samples * index // len(ANSWER_TOKENS)
        end = num_samples * (index + 1) // len(ANSWER_TOKENS)

        count = 0
        for _ in islice(packer.conversations(answers.conversations(length)), end - start):
            count += 1
            next(bar, None)
        counts.append(count)

    if sum(counts) < num_samples:
        warn(
            f"{len(answers.prompts):,} prompts are answered at most {MAX_ANSWERS_PER_PROMPT} times each, which makes "
            f"{sum(counts):,} of {num_samples:,} samples. The others are text. Pass a file with more `prompts`."
        )
    return counts


def answer_file(*depends_on: Any) -> AnswerFile:
    """Return the file of answers that depend on these values."""
    return AnswerFile(TextCache("answers", *depends_on).path)
