"""Train a pruned encoder towards the outputs of the original model, and compare the vectors of both."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import fields, replace
from functools import partial
from random import Random
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments

from ..arch.meta import positions_of, predicts_next, reads_text
from ..arch.modules import embedding_of
from ..config.pruning import StructPruneConfig
from ..config.recovery import RecoveryConfig
from ..distillation.both_tokenizers import BothTokenizers
from ..distillation.heads import attach_to_head
from ..domains.manifest import Entry, Manifest
from ..domains.templates import read_pairs
from ..measure.text import Text
from ..measure.vectors import MOST_TOKENS, SENTENCE_BREAKS, Embeddings, Pooling, Texts, judged_texts, texts_compared
from ..record.figures import PRUNED, RECOVERED, Figure, TextResult
from ..record.report import RecoveryReport
from ..system.errors import StructPruneError
from ..system.stages import stage
from .adapter import trainable
from .measure import check_loss
from .text import MAX_VALIDATION_TOKENS, TextStream, measured_tokens, text_config, validation_text
from .training import EvaluateLastStep, ShowProgress, StopAtNaN, remove_printers, train


# The numbers of sentences in a passage. Users send from one sentence to a few paragraphs.
SENTENCES = (1, 1, 1, 2, 3, 4, 6, 10)
# The share of passages that a few of their words follow, as in a search.
QUERY_SHARE = 0.3
QUERY_WORDS = (2, 8)
# One of this number of pairs measures the model, and the others are trained on.
PAIRS_PER_MEASURED = 8
MOST_MEASURED_PAIRS = 256
# Batches of this number of batches are sorted by length together.
BATCHES_PER_SORT = 32
# Fields of `TrainingArguments`, as `TRAINING` of the config.
ENCODER_TRAINING = {
    "learning_rate": 2e-4,
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 32,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0.1,
    "train_sampling_strategy": "sequential",
    "metric_for_best_model": "loss",
}


def can_recover(model: PreTrainedModel) -> bool:
    """Return whether a recovery can make the inputs of a model from text alone."""
    if predicts_next(model):
        return True
    return reads_text(model) and not model.config.is_encoder_decoder and not hasattr(model, "get_text_features")


def check_encoder(model: PreTrainedModel, config: RecoveryConfig) -> None:
    """Raise `StructPruneError` if the inputs of a model are unknown, or a setting is for other models."""
    name = type(model).__name__
    if not can_recover(model):
        raise StructPruneError(
            f"Recovery trains models that read text alone, and {name} needs other inputs too. Call "
            "`attach_teacher(trainer, teacher)` in the Trainer of its task."
        )
    if config.train == "lora":
        raise StructPruneError(
            f"`train`='lora' is for causal language models, and {name} is not one. An adapter saves memory, which "
            "small models do not need, so all weights are trained. Remove `train`."
        )
    if config.prompts is not None:
        raise StructPruneError(f"`prompts` is for causal language models, and {name} is not one. Use `pairs`.")


def check_has_teacher(model: PreTrainedModel, teacher: Any) -> None:
    """Raise `StructPruneError` if a model that does not predict the next token has no teacher."""
    if teacher is None and not predicts_next(model):
        raise StructPruneError(
            f"A {type(model).__name__} learns from a teacher. Pass the original model with `teacher`."
        )


class Passages:
    """The text of the recovery of an encoder.

    Args:
        config: How the model is trained.
        pruning: How it was pruned.
        seq_length: The number of tokens that are read at a time.
        teacher: The original model.
        tokenizer: Its tokenizer.
        earlier: The text that an earlier run has used.

    Attributes:
        training: The training texts.
        validation: The texts that compare checkpoints, of a kind that is not trained on.
        measured: The texts that measure the model, by domain.
        pairs: The names of the domains in `measured` whose second half answers the first half.
    """

    def __init__(
        self,
        config: RecoveryConfig,
        pruning: StructPruneConfig,
        seq_length: int,
        teacher: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        earlier: Manifest | None,
    ):
        text = text_config(config, pruning, seq_length)
        self.stream = TextStream(text, tokenizer, teacher, earlier)
        self.measured, judged = judged_texts(self.stream.heldout, tokenizer, text.seed, earlier)
        used: set[str] = set()
        for domain in self.stream.heldout:
            used.update(domain.documents, domain.heldout_documents)
        for entry in judged:
            used.update(entry.heldout_documents)

        num_samples = max(2, measured_tokens(config.tokens, MAX_VALIDATION_TOKENS) // seq_length)
        samples, names = validation_text(config, text, tokenizer, used, num_samples)
        validation = texts_compared(samples, tokenizer).texts
        if isinstance(validation, Tensor):
            raise StructPruneError(
                f"The validation text has no sentence of 20 bytes in samples of {seq_length} tokens. Choose longer "
                "samples (`seq_length`), or another validation text."
            )
        self.validation = list(validation)
        self.stream.skip([*used, *names])
        self.stream.check_enough(text.num_samples)

        generator = Random(text.seed)
        rows = torch.tensor(list(self.stream.samples(text.num_samples)))
        self.training = list(passages(rows, tokenizer, generator))
        self.pairs: list[str] = []
        if config.pairs is not None:
            self._add_pairs(config.pairs, generator)
        self.entries: list[Entry] = judged + self.stream.entries(text.num_samples)

    def _add_pairs(self, path: str, generator: Random) -> None:
        """Train on the texts of a file of pairs, and measure the model on some of them."""
        for name, texts in read_pairs([path]).items():
            half = len(texts) // 2
            numbers = generator.sample(range(half), half)
            count = min(half // PAIRS_PER_MEASURED, MOST_MEASURED_PAIRS)
            measured = [texts[number] for number in numbers[:count]]
            measured += [texts[half + number] for number in numbers[:count]]
            if count:
                self.measured[name] = Texts.of_pairs(measured)
                self.pairs.append(name)

            for number in numbers[count:]:
                self.training += [texts[number], texts[half + number]]
        generator.shuffle(self.training)


def passages(rows: Tensor, tokenizer: PreTrainedTokenizerBase, generator: Random) -> Iterator[str]:
    """Yield the text of samples in passages of a few sentences, and a few words of some of them.

    Args:
        rows: Token ids of shape `(samples, seq_length)`.
        tokenizer: Their tokenizer.
        generator: Chooses the lengths.
    """
    for documents in Text.of(rows, tokenizer).strings:
        for document in documents:
            sentences = [sentence.strip() for sentence in SENTENCE_BREAKS.split(document) if sentence.strip()]
            start = 0
            while start < len(sentences):
                end = start + generator.choice(SENTENCES)
                passage = " ".join(sentences[start:end])
                yield passage
                start = end

                words = passage.split()
                if generator.random() < QUERY_SHARE and len(words) > QUERY_WORDS[1]:
                    first = generator.randrange(len(words) - QUERY_WORDS[1])
                    yield " ".join(words[first : first + generator.randint(*QUERY_WORDS)])


def encoded(
    tokenizer: PreTrainedTokenizerBase, prompt: str, max_tokens: int, rows: Sequence[str], batch: Any = None
) -> Mapping[str, Tensor]:
    """Return texts as a batch of token ids, with the prompt before each text."""
    texts = [prompt + text for text in rows]
    batch_of_ids: Mapping[str, Tensor] = tokenizer(
        texts, padding=True, truncation=True, max_length=max_tokens, return_tensors="pt"
    )
    return dict(batch_of_ids)


def sorted_by_length(texts: Sequence[str], batch_size: int, generator: Random) -> list[str]:
    """Return texts in a random order in which the texts of a batch have similar lengths."""
    shuffled = generator.sample(list(texts), len(texts))
    ordered: list[str] = []
    size = batch_size * BATCHES_PER_SORT
    for start in range(0, len(shuffled), size):
        part = sorted(shuffled[start : start + size], key=len)
        batches = [part[first : first + batch_size] for first in range(0, len(part), batch_size)]
        generator.shuffle(batches)
        for batch in batches:
            ordered += batch
    return ordered


def train_encoder(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    teacher: PreTrainedModel,
    teacher_tokenizer: PreTrainedTokenizerBase,
    data: Passages,
    arguments: TrainingArguments,
    callbacks: Sequence[TrainerCallback],
    checkpoint: str | None,
) -> RecoveryReport:
    """Train an encoder in place. It keeps the weights of the best checkpoint, or its own if none is better.

    Args:
        model: The pruned model.
        tokenizer: Its tokenizer.
        teacher: The original model.
        teacher_tokenizer: The tokenizer of the original model.
        data: The text.
        arguments: The arguments of the Trainer.
        callbacks: Further callbacks.
        checkpoint: The checkpoint to resume from, or None.

    Returns:
        The report, with the figures of the vectors before and after the training.
    """
    prompt = Pooling.of(teacher).prompt
    max_tokens = int(min(positions_of(model), positions_of(teacher), MOST_TOKENS))
    collators = [partial(encoded, reader, prompt, max_tokens) for reader in (tokenizer, teacher_tokenizer)]
    collator: Any = collators[0]
    if tokenizer.get_vocab() != teacher_tokenizer.get_vocab():
        collator = BothTokenizers(*collators)
    texts = sorted_by_length(data.training, arguments.per_device_train_batch_size, Random(arguments.seed))

    with stage("vectors", {}):
        measured = Embeddings(teacher, data.measured, teacher_tokenizer, False, data.pairs)
        measured.tokenizer = tokenizer
        before, _ = measured.figures(model)

    tokens = sum(map(len, tokenizer(texts, truncation=True, max_length=max_tokens)["input_ids"]))
    stopper = StopAtNaN()
    shown = ShowProgress("divergence", lambda steps: round(tokens * steps / arguments.max_steps))
    with trainable(model, None) as (_, take_back):
        embedding = embedding_of(model)
        if embedding is not None:
            embedding.requires_grad_(False)
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=texts,  # type: ignore[arg-type]
            eval_dataset=data.validation,  # type: ignore[arg-type]
            data_collator=collator,
            callbacks=[*callbacks, stopper, EvaluateLastStep()],
        )
        trainer.label_names = []  # the text has no labels
        remove_printers(trainer)
        attach_to_head(trainer, teacher, tokenizer=tokenizer, teacher_tokenizer=teacher_tokenizer)
        pruned_loss = trainer.evaluate()["eval_loss"]
        check_loss(pruned_loss)
        trainer.add_callback(shown)
        with closing(shown):
            seconds = train(trainer, checkpoint)
        trainer.remove_callback(shown)
        is_better = trainer.evaluate()["eval_loss"] < pruned_loss  # also False if a loss is NaN
        if not is_better:
            take_back()

    after = before
    if is_better:
        with stage("vectors", {}):
            after, _ = measured.figures(model)
    steps = trainer.state.global_step
    report = RecoveryReport(
        tokens=tokens,
        steps=steps,
        seconds=seconds,
        kept_step=(trainer.state.best_global_step or steps) if is_better else 0,
        stopped=stopper.message,
        learning_rate=arguments.learning_rate,
    )
    for name, result in after.items():
        report.domains[name] = with_recovered(before[name], result)
    return report


def with_recovered(pruned: TextResult, recovered: TextResult) -> TextResult:
    """Return the figures of the vectors of the pruned and the recovered model in one result."""
    figures: dict[str, Any] = {}
    for field in fields(recovered):
        figure = getattr(recovered, field.name)
        if isinstance(figure, Figure):
            values = dict(getattr(pruned, field.name).values)
            values[RECOVERED] = figure.values[PRUNED]
            figures[field.name] = Figure.of(values, figure.margin)
    return replace(recovered, **figures)
