"""The data of a recovery: a stream of training samples, and the samples that measure the model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch.utils.data import IterableDataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..config.pruning import StructPruneConfig
from ..config.recovery import RecoveryConfig
from ..domains.manifest import Entry, Manifest
from ..forward.generation import end_tokens
from ..sources.other import OtherText, other_text
from ..system.fingerprint import fingerprint
from .answers import ANSWER_TOKENS, PROMPTS_PER_BATCH, TEMPERATURE, Answers, answer_file, write_answers, writer_of
from .prompts import MAX_PROMPT_TOKENS, prompts_of
from .samples import Sample, SamplePacker, text_sample
from .teacher import Teacher
from .text import OTHER_TEXT, VALIDATION, VALIDATION_TOKENS, TextStream, text_config, validation_text


ANSWERS = "answers"
# The largest length of the answers that a model is measured on.
MEASURED_ANSWER_TOKENS = 64
MAX_MEASURED_PROMPTS = 32
# Samples of text whose openings are prompts for a model without a chat template.
MAX_OPENING_SAMPLES = 512
# Of so many training tokens, one is a token of validation text, between the minimum and `VALIDATION_TOKENS`.
TRAINING_PER_VALIDATION = 50
MIN_VALIDATION_TOKENS = 512


class SampleStream(IterableDataset[Sample]):
    """The training samples in order: text, and answers evenly between them.

    Every iteration reads the text and the answers again, from the first sample.
    """

    def __init__(self, text: TextStream, answers: Answers | None, packer: SamplePacker, answer_counts: Sequence[int]):
        self.text = text
        self.answers = answers
        self.packer = packer
        self.answer_counts = answer_counts
        self.num_samples = text.config.num_samples

    def __iter__(self) -> Iterator[Sample]:
        num_answers = sum(self.answer_counts)
        texts = self.text.samples(self.num_samples - num_answers)
        answers: Iterator[Sample] = iter(())
        if self.answers is not None:
            answers = self.answers.samples(self.packer, self.answer_counts)

        for number in range(self.num_samples):
            before = number * num_answers // self.num_samples
            after = (number + 1) * num_answers // self.num_samples
            if after > before:
                yield next(answers)
            else:
                yield text_sample(next(texts))


class RecoveryData:
    """The data of a recovery.

    Args:
        config: How the model is trained.
        pruning: How it was pruned.
        seq_length: The number of tokens in a sample.
        model: The model.
        tokenizer: Its tokenizer.
        teacher: The teacher, or None.
        seen: The text that an earlier run has used.
        counts_prompts: See `SamplePacker`.

    Attributes:
        stream: The training samples.
        measured: The samples that measure the model, by kind of text; no training step reads them.
        validation: The samples that checkpoints are compared by: validation text and answers by their shares of the
            training, or without a teacher, held-out text.
        other: Other text, by which nothing is chosen.
    """

    def __init__(
        self,
        config: RecoveryConfig,
        pruning: StructPruneConfig,
        seq_length: int,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        teacher: Teacher | None,
        seen: Manifest | None,
        counts_prompts: bool = True,
    ):
        text = text_config(config, pruning, seq_length)
        self.teacher = teacher
        reader: Any = model
        reader_tokenizer = tokenizer
        if teacher is not None:
            # The teacher reads and writes in its own tokens, also if the student has lost some.
            reader = teacher.model
            reader_tokenizer = teacher.tokenizer
        stream = TextStream(text, reader_tokenizer, reader, seen)
        self.measured: dict[str, list[Sample]] = {}
        for domain in stream.heldout:
            self.measured[domain.name] = [text_sample(ids) for ids in domain.heldout]
        self.validation: list[Sample] = [sample for kind in self.measured.values() for sample in kind]
        self.other = OtherText("")

        answers: Answers | None = None
        counts: Sequence[int] = [0] * len(ANSWER_TOKENS)
        packer = SamplePacker(seq_length, counts_prompts)
        if teacher is not None:
            assert reader_tokenizer is not None  # `TextStream` has read text with it
            self._add_validation(config, text, stream, teacher, reader_tokenizer)
            if config.answer_share > 0:
                answers, counts = self._add_answers(config, text, stream, packer)

        stream.check_enough(text.num_samples - sum(counts))
        self.stream = SampleStream(stream, answers, packer, counts)

    @property
    def entries(self) -> list[Entry]:
        """The used text, for the manifest. Documents are known once they were read."""
        return [*self.stream.text.entries(), *self.other.entries]

    def _add_validation(
        self,
        config: RecoveryConfig,
        text: StructPruneConfig,
        stream: TextStream,
        teacher: Teacher,
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        tokens = max(MIN_VALIDATION_TOKENS, min(VALIDATION_TOKENS, config.tokens // TRAINING_PER_VALIDATION))
        count = max(2, tokens // text.seq_length)
        self.num_measured_answers = round(config.answer_share * count)

        used: set[str] = set()
        for domain in stream.heldout:
            used.update(domain.documents, domain.heldout_documents)

        num_texts = max(1, count - self.num_measured_answers)
        samples, names = validation_text(config, text, tokenizer, used, num_texts)
        stream.skip(names)
        self.measured[VALIDATION] = [text_sample(ids) for ids in samples]
        self.validation = self.measured[VALIDATION]

        self.other = other_text(text, teacher.model, tokenizer, stream.heldout)
        if self.other.rows:
            for entry in self.other.entries:
                stream.skip(entry.heldout_documents)
            self.measured[OTHER_TEXT] = [text_sample(ids) for ids in self.other.rows]

    def _add_answers(
        self, config: RecoveryConfig, text: StructPruneConfig, stream: TextStream, packer: SamplePacker
    ) -> tuple[Answers, list[int]]:
        """Write the answers. Those to some prompts are set aside and measure the model."""
        assert self.teacher is not None and self.teacher.tokenizer is not None
        model, tokenizer = self.teacher.model, self.teacher.tokenizer
        num_samples = max(1, round(config.answer_share * text.num_samples))

        openings = list(stream.samples(min(num_samples, MAX_OPENING_SAMPLES)))
        max_tokens = min(MAX_PROMPT_TOKENS, text.seq_length // 2)
        prompts = prompts_of(config.prompts, model, tokenizer, openings, text.seed, max_tokens)
        aside_count = min(MAX_MEASURED_PROMPTS, len(prompts) // 2)
        write = writer_of(model, tokenizer)

        depends_on = [
            fingerprint(model), ANSWER_TOKENS, TEMPERATURE, PROMPTS_PER_BATCH, text.seed, end_tokens(model, tokenizer)
        ]  # fmt: skip

        def answers_to(part: Sequence[list[int]]) -> Answers:
            return Answers(part, write, answer_file(*depends_on, part), text.seed)

        aside = answers_to(prompts[:aside_count])
        most = max(1, self.num_measured_answers)
        counts = [most if length == MEASURED_ANSWER_TOKENS else 0 for length in ANSWER_TOKENS]
        measured = list(aside.samples(SamplePacker(packer.seq_length, counts_prompts=False), counts))
        if measured:
            self.measured[ANSWERS] = measured
            self.validation = measured if config.answer_share == 1 else [*self.measured[VALIDATION], *measured]

        asked = answers_to(prompts[aside_count:])
        return asked, write_answers(asked, packer, num_samples)
