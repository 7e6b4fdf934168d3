"""The data of a recovery: texts and answers to train on, and what checkpoints are compared by."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from math import inf, isfinite
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, TrainingArguments

from ..arch.meta import positions_of
from ..config.recovery import RecoveryConfig
from ..domains.packing import Domain
from ..errors import StructPruneError
from ..forward.generation import end_tokens
from ..system.fingerprint import fingerprint
from .answers import Answers, kept_answers, prompts_of, writer_of
from .samples import Sample, answer_samples, in_parts, text_sample
from .teacher import Teacher, measure_samples
from .text import HELDOUT_TOKENS, OTHER_TEXT, VALIDATION


ANSWERS = "answers"


class TrainingData:
    """The `samples` of a recovery in order, and by kind of text the `measured` ones, which no step reads.

    Batches of `batch_size` texts or answers take turns. `weights` are the shares of the kinds in the validation loss.
    """

    def __init__(
        self,
        config: RecoveryConfig,
        domains: Sequence[Domain],  # with held-out text of the same kinds
        validation: Tensor | None,  # another kind of text, shape `(samples, seq_length)`; None without a teacher
        other: Sequence[Tensor],  # rows of text by which nothing is chosen, each of shape `(tokens,)`
        model: PreTrainedModel,
        teacher: Teacher | None,
        seeds: tuple[int, int],  # the first orders the samples, and the second chooses the text
        arguments: TrainingArguments,
    ):
        self.teacher = teacher
        order_seed, text_seed = seeds
        answer_share = 0.0 if teacher is None else float(config.answer_share)
        counts = [round((1 - answer_share) * len(domain.samples)) for domain in domains]
        texts = torch.cat([domain.samples[:count] for domain, count in zip(domains, counts, strict=True)])
        replaced = torch.cat([domain.samples[count:] for domain, count in zip(domains, counts, strict=True)])

        most = max(1, HELDOUT_TOKENS // texts.shape[1])
        rows: dict[str, Any] = {domain.name: domain.heldout[:most] for domain in domains}
        weights = {name: len(heldout) for name, heldout in rows.items()}
        if validation is not None:
            rows |= {VALIDATION: validation, **({OTHER_TEXT: other} if other else {})}
            weights = {VALIDATION: len(texts), ANSWERS: len(replaced)}
        self.weights = {name: weight / sum(weights.values()) for name, weight in weights.items() if weight}
        self.measured = {name: [text_sample(ids) for ids in of_kind] for name, of_kind in rows.items()}

        answers: list[Sample] = []
        if teacher is not None and len(replaced):
            aside, asked = _answers_of(teacher, config.prompts, replaced, text_seed)
            self.measured[ANSWERS], answers = [*islice(aside, most)], [*asked]
        shuffled = torch.randperm(len(texts), generator=torch.Generator().manual_seed(order_seed))
        # Of all processes, which read one batch between them; of 0 or less, the Trainer says what is wrong.
        self.batch_size = max(1, arguments.train_batch_size) * arguments.world_size
        self.samples = _mixed([text_sample(ids) for ids in texts[shuffled]], answers, self.batch_size)
        if teacher is not None:
            self._take_from(teacher, model, arguments.bf16)

    def _take_from(self, teacher: Teacher, model: PreTrainedModel, mixed: bool) -> None:
        # All samples are spelled as the model reads them.
        teacher.keep_states(self.samples, torch.bfloat16, mixed)  # which takes half of the memory
        teacher.keep_states([sample for samples in self.measured.values() for sample in samples])
        if teacher.head is not None:  # which makes logits of the states that are kept
            teacher.model = None
        if (parts := teacher.parts) is None:
            return
        seq_length = 1 + max(len(sample["input_ids"]) for sample in self.measured[VALIDATION])
        self.samples = [in_parts(sample, parts) for sample in self.samples]
        self.measured = {name: [in_parts(each, parts) for each in samples] for name, samples in self.measured.items()}
        every = [*self.samples, *(sample for samples in self.measured.values() for sample in samples)]
        longest = 1 + max(int(sample["position_ids"].max()) for sample in every)
        if longest > (room := positions_of(model)):
            raise StructPruneError(
                f"A sample of seq_length={seq_length} takes {longest} of the tokens that stay, and the model has "
                f"{room:.0f} positions; lower seq_length to {seq_length * room // longest:.0f}."
            )

    def measure(self, model: Any) -> dict[str, dict[str, Tensor]]:
        """Measure a model on each kind of text; see `measure_samples`."""
        return {name: measure_samples(model, samples, self.teacher) for name, samples in self.measured.items()}

    def validation_loss(self, model: Any) -> float:
        """Measure the loss by which checkpoints are compared; see `loss_in`."""
        return self.loss_in({name: measure_samples(model, self.measured[name], self.teacher) for name in self.weights})

    def loss_in(self, found: Mapping[str, Mapping[str, Tensor]]) -> float:
        """Give the validation loss in what `measure` found, or infinity if it is not finite.

        It is the mean KL to the teacher on validation text and along answers, by their shares of the training; without
        a teacher, the mean loss on held-out text.
        """
        value = "loss" if self.teacher is None else "kl"
        mean = sum(weight * float(found[name][value].mean()) for name, weight in self.weights.items())
        return mean if isfinite(mean) else inf


def _answers_of(
    teacher: Teacher, prompts_file: str | None, texts: Tensor, seed: int
) -> tuple[Iterator[Sample], Iterator[Sample]]:
    """Makes samples of a teacher's answers: to measure on, without end, and one in place of each text."""
    dense, tokenizer = teacher.model, teacher.tokenizer
    assert dense is not None and tokenizer is not None  # it has read the text
    prompts, places = prompts_of(prompts_file, dense, tokenizer, texts, seed), texts.shape[1] - 1
    write, weights, ends = writer_of(dense, tokenizer), fingerprint(dense), end_tokens(dense, tokenizer)
    count = min(32, len(prompts) // 2)  # whose answers are measured
    parts = prompts[:count], prompts[count:]
    aside, asked = (Answers(part, write, kept_answers(weights, ends, part, seed), seed) for part in parts)
    return answer_samples(aside.conversations(64), places), asked.samples(len(texts), places)


def _mixed(texts: Sequence[Sample], answers: Sequence[Sample], batch_size: int) -> list[Sample]:
    """Mixes texts and answers evenly, in batches of one kind; those that are not full come last."""
    # With its prompts, a sample of answers is several times as long as a text, which would be padded beside it.
    batches: list[tuple[bool, float, Sequence[Sample]]] = []
    for samples in (texts, answers):
        for start in range(0, len(samples), batch_size):
            batch = samples[start : start + batch_size]
            batches.append((len(batch) < batch_size, start / len(samples), batch))
    return [sample for *_, batch in sorted(batches, key=lambda each: each[:2]) for sample in batch]
