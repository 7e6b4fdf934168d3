"""Make the data of a recovery: a stream of training samples, and the samples that measure the model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch.utils.data import IterableDataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..arch.generation import end_tokens
from ..config.pruning import StructPruneConfig
from ..config.recovery import RecoveryConfig
from ..distillation.teacher import Teacher
from ..domains.manifest import Entry, Manifest
from ..domains.unseen import UnseenText, unseen_text
from ..measure.batches import Sample
from ..record.figures import UNSEEN_TEXT
from ..system.fingerprint import fingerprint
from .answers import ANSWER_TOKENS, TEMPERATURE, Answers, answer_file, prompts_per_batch, write_answers, writer_of
from .prompts import MAX_PROMPT_TOKENS, prompts_of
from .samples import SamplePacker, text_sample
from .text import (
    MAX_VALIDATION_TOKENS,
    VALIDATION,
    TextStream,
    answer_samples,
    measured_tokens,
    text_config,
    validation_text,
)


ANSWERS = "answers"
# The maximum number of tokens in the answers that measure a model.
MEASURED_ANSWER_TOKENS = 64
MAX_MEASURED_PROMPTS = 32
# The maximum number of text samples whose openings are prompts for a model without a chat template.
MAX_OPENING_SAMPLES = 512


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
        self.num_texts = self.num_samples - sum(answer_counts)

    def __iter__(self) -> Iterator[Sample]:
        num_answers = sum(self.answer_counts)
        texts = self.text.samples(self.num_texts)
        answers: Iterator[Sample] = iter(())
        if self.answers is not None:
            answers = self.answers.samples(self.packer, self.answer_counts)

        for number in range(self.num_samples):
            answers_so_far = number * num_answers // self.num_samples
            answers_due = (number + 1) * num_answers // self.num_samples
            if answers_due > answers_so_far:
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
        earlier: The text that an earlier run has used.
        counts_prompts: See `SamplePacker`.

    Attributes:
        stream: The training samples.
        measured: The samples that measure the model, by kind of text. No training step reads them.
        validation: The samples that compare checkpoints: validation text and answers, in the proportions of
            the training, or held-out text without a teacher.
        unseen: Unseen text, which has no influence on the training.
    """

    def __init__(
        self,
        config: RecoveryConfig,
        pruning: StructPruneConfig,
        seq_length: int,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        teacher: Teacher | None,
        earlier: Manifest | None,
        counts_prompts: bool = True,
    ):
        text = text_config(config, pruning, seq_length)
        self.seq_length = seq_length
        self.teacher = teacher
        reader: Any = model
        reader_tokenizer = tokenizer
        if teacher is not None:
            # The teacher reads and writes in its own tokens, even if the student lacks some of them.
            reader = teacher.model
            reader_tokenizer = teacher.tokenizer
        stream = TextStream(text, reader_tokenizer, reader, earlier)

        self.measured: dict[str, list[Sample]] = {}
        self.validation: list[Sample] = []
        for domain in stream.heldout:
            samples = [text_sample(ids) for ids in domain.heldout]
            self.measured[domain.name] = samples
            self.validation += samples
        self.unseen = UnseenText("")

        answers: Answers | None = None
        num_answers = 0
        counts: Sequence[int] = [0] * len(ANSWER_TOKENS)
        packer = SamplePacker(seq_length, counts_prompts)
        if teacher is not None:
            assert reader_tokenizer is not None  # `TextStream` has read text with it
            self._add_validation(config, text, stream, teacher, reader_tokenizer)
            num_answers = answer_samples(config, text.num_samples)

        # Writing answers takes long, so the text is checked first.
        stream.check_enough(text.num_samples - num_answers)
        if num_answers > 0:
            answers, counts = self._add_answers(config, text, stream, packer, num_answers)
            if sum(counts) < num_answers:
                # More text is read instead of the missing answers.
                stream.check_enough(text.num_samples - sum(counts))
        self.stream = SampleStream(stream, answers, packer, counts)

    @property
    def entries(self) -> list[Entry]:
        """Return the entries of the manifest for all text, with the documents that were read so far."""
        entries = self.stream.text.entries(self.stream.num_texts)
        entries += self.unseen.entries
        return entries

    def _add_validation(
        self,
        config: RecoveryConfig,
        text: StructPruneConfig,
        stream: TextStream,
        teacher: Teacher,
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        """Read the validation text and the unseen text, whose documents the training skips."""
        tokens = measured_tokens(config.tokens, MAX_VALIDATION_TOKENS)
        count = max(2, tokens // text.seq_length)
        self.num_measured_answers = round(config.answer_share * count)

        hashes: set[str] = set()
        for domain in stream.heldout:
            hashes.update(domain.documents, domain.heldout_documents)

        num_texts = max(1, count - self.num_measured_answers)
        samples, names = validation_text(config, text, tokenizer, hashes, num_texts)
        stream.skip(names)
        self.measured[VALIDATION] = [text_sample(ids) for ids in samples]
        self.validation = self.measured[VALIDATION]

        self.unseen = unseen_text(text, teacher.model, tokenizer, stream.heldout)
        if self.unseen.rows:
            for entry in self.unseen.entries:
                stream.skip(entry.heldout_documents)
            self.measured[UNSEEN_TEXT] = [text_sample(ids) for ids in self.unseen.rows]

    def _add_answers(
        self,
        config: RecoveryConfig,
        text: StructPruneConfig,
        stream: TextStream,
        packer: SamplePacker,
        num_samples: int,
    ) -> tuple[Answers, list[int]]:
        """Write the answers. The answers to some prompts measure the model and are not trained on."""
        assert self.teacher is not None and self.teacher.tokenizer is not None
        model = self.teacher.model
        tokenizer = self.teacher.tokenizer

        openings = stream.openings(min(num_samples, MAX_OPENING_SAMPLES))
        max_tokens = min(MAX_PROMPT_TOKENS, text.seq_length // 2)
        prompts = prompts_of(config.prompts, model, tokenizer, openings, text.seed, max_tokens)
        num_measured_prompts = min(MAX_MEASURED_PROMPTS, len(prompts) // 2)
        write = writer_of(model, tokenizer)

        depends_on = [fingerprint(model), ANSWER_TOKENS, TEMPERATURE, text.seed, end_tokens(model, tokenizer)]

        def answers_to(part: Sequence[list[int]], num_tokens: int, length: int) -> Answers:
            batch_size = prompts_per_batch(num_tokens, length)
            file = answer_file(*depends_on, batch_size, part)
            return Answers(part, write, file, text.seed, batch_size)

        counts = [0] * len(ANSWER_TOKENS)
        num_measured = max(1, self.num_measured_answers)
        counts[ANSWER_TOKENS.index(MEASURED_ANSWER_TOKENS)] = num_measured
        measured_answers = answers_to(
            prompts[:num_measured_prompts], num_measured * packer.seq_length, MEASURED_ANSWER_TOKENS
        )
        samples = list(measured_answers.samples(SamplePacker(packer.seq_length, counts_prompts=False), counts))
        if samples:
            self.measured[ANSWERS] = samples
            self.validation = list(samples)
            if config.answer_share < 1:
                self.validation = self.measured[VALIDATION] + samples

        tokens_per_length = num_samples * packer.seq_length // len(ANSWER_TOKENS)
        training_answers = answers_to(prompts[num_measured_prompts:], tokens_per_length, max(ANSWER_TOKENS))
        return training_answers, write_answers(training_answers, packer, num_samples)
