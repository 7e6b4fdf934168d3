"""What a recovery trains on, text and answers in turn, and what it is measured by."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice, takewhile
from math import inf, isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from ..arch.meta import positions_of
from ..config.recovery import RecoveryConfig
from ..domains.packing import Domain
from ..errors import StructPruneError
from ..forward.generation import end_tokens
from ..system.fingerprint import fingerprint
from .answers import LENGTHS, LONGEST, Answers, answers_file, prompts_of, writer_of
from .samples import Sample, answer_samples, in_parts, reads_shared_prefix, text_sample
from .teacher import Teacher, measure_samples
from .text import ANSWERS, LEFT_OUT, MEASURED


# The answers that are measured on, of so many tokens at most, are to prompts that are not trained on.
ASIDE, ASIDE_TOKENS = 32, 64


class Curriculum:
    """The `lessons` of a recovery in their order, and by kind the samples of its `probes`, by which it is measured; a
    scratch folder keeps what the teacher predicts for them.
    """

    def __init__(
        self,
        config: RecoveryConfig,
        domains: Sequence[Domain],
        left_out: Tensor | None,
        model: PreTrainedModel,
        teacher: Teacher | None,
        seeds: tuple[int, int],
        scratch: Path,
        arguments: TrainingArguments,
    ):
        order, text_seed = seeds
        self.teacher = teacher
        share = 0.0 if teacher is None else float(config.answer_share)
        counts = [round((1 - share) * len(domain.samples)) for domain in domains]
        texts = torch.cat([domain.samples[:count] for domain, count in zip(domains, counts, strict=True)])
        spare = torch.cat([domain.samples[count:] for domain, count in zip(domains, counts, strict=True)])
        most = max(1, MEASURED // spare.shape[1])
        measured_on = {domain.name: domain.heldout[:most] for domain in domains}
        measured_on |= {} if left_out is None else {LEFT_OUT: left_out}
        self.probes = {name: [text_sample(row) for row in ids] for name, ids in measured_on.items()}
        self.learns = left_out is None or config.kl_weight < 1
        weights = {domain.name: len(self.probes[domain.name]) for domain in domains}
        weights = weights if self.learns else {LEFT_OUT: len(texts), ANSWERS: len(spare)}
        self.compared = {name: count / sum(weights.values()) for name, count in weights.items() if count}
        answers: list[Sample] = []
        if len(spare):
            assert teacher is not None and teacher.model is not None  # only a teacher has answers
            taught_by, tokenizer = teacher.model, teacher.tokenizer
            assert tokenizer is not None  # it has read the text
            prompts = prompts_of(config.prompts, taught_by, tokenizer, spare, text_seed)
            shared = _shared_prefix(prompts, texts.shape[1], model, taught_by)
            self.probes[ANSWERS], answers = _written(prompts, taught_by, tokenizer, spare, most, text_seed, shared)
        shuffled = torch.randperm(len(texts), generator=torch.Generator().manual_seed(order))
        self.lessons = _mixed([text_sample(ids) for ids in texts[shuffled]], answers, arguments.train_batch_size)
        if teacher is not None:
            teacher.note(self.lessons, scratch / "states", arguments.bf16)
            teacher.note([sample for samples in self.probes.values() for sample in samples])
            teacher.release()
        if teacher is not None and (parts := teacher.parts) is not None:
            self.lessons = [in_parts(sample, parts) for sample in self.lessons]
            self.probes = {name: [in_parts(each, parts) for each in samples] for name, samples in self.probes.items()}
            every = [*self.lessons, *(sample for samples in self.probes.values() for sample in samples)]
            longest = 1 + max(int(sample["position_ids"].max()) for sample in every)
            if longest > (room := positions_of(model)):
                raise StructPruneError(
                    f"A sample of seq_length={texts.shape[1]} takes {longest} of the tokens that stay, and the model "
                    f"has {room:.0f} positions; lower seq_length to {texts.shape[1] * room // longest:.0f}."
                )

    def ids(self) -> Tensor:
        """All that decides what is learnt and what is kept, as one row of token ids."""
        samples = [*self.lessons, *(sample for samples in self.probes.values() for sample in samples)]
        return torch.cat([sample[name] for sample in samples for name in ("input_ids", "targets")])

    def measure(self, model: Any) -> dict[str, dict[str, Tensor]]:
        """How a model does on each probe; see `measure_samples`."""
        return {name: measure_samples(model, samples, self.teacher) for name, samples in self.probes.items()}

    def distance(self, model: Any) -> float:
        """How far a model is; see `distance_in`."""
        found = {name: measure_samples(model, self.probes[name], self.teacher) for name in self.compared}
        return self.distance_in(found)

    def distance_in(self, found: dict[str, dict[str, Tensor]]) -> float:
        """The divergence from the teacher on text of a kind that is left out and along its answers, by their shares of
        the training; where the text is to be learnt, the loss on text of its kinds; infinite where it is not finite.
        """
        what = "loss" if self.learns else "divergence"
        mean = sum(part * float(found[name][what].mean()) for name, part in self.compared.items())
        return mean if isfinite(mean) else inf


def _shared_prefix(prompts: Sequence[Sequence[int]], seq_length: int, *models: PreTrainedModel) -> int:
    """How many tokens all prompts begin with, as the turn of the system, if all models can read them once, beside text
    of `seq_length` tokens too.
    """
    same = sum(1 for _ in takewhile(lambda tokens: len({*tokens}) == 1, zip(*prompts, strict=False)))
    shared = min(same, min(map(len, prompts)) - 1)
    longest = max(LONGEST + LENGTHS[-1], seq_length)
    return shared if all(reads_shared_prefix(model, longest) for model in models) else 0


def _written(
    prompts: Sequence[Sequence[int]],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    spare: Tensor,
    most: int,
    seed: int,
    shared: int,
) -> tuple[list[Sample], list[Sample]]:
    """Samples of answers that a model writes: so many at most that are set aside, and one for each spare text."""
    places, count = spare.shape[1] - 1, min(ASIDE, len(prompts) // 2)
    write, known, ends = writer_of(model, tokenizer), fingerprint(model), end_tokens(model, tokenizer)
    parts = prompts[:count], prompts[count:]
    aside, asked = (Answers(part, write, answers_file(known, ends, part, seed), seed) for part in parts)
    measured_on = [*islice(answer_samples(aside.conversations(ASIDE_TOKENS), places, shared), most)]
    return measured_on, [*asked.samples(len(spare), places, shared)]


def _mixed(texts: Sequence[Sample], answers: Sequence[Sample], batch_size: int) -> list[Sample]:
    """Texts and answers, each in their order, in batches of one kind that are evenly mixed; those not full come last.
    With its prompts, a sample of answers is several times as long as a text, which would be padded beside it.
    """
    batches: list[tuple[bool, float, Sequence[Sample]]] = []
    for samples in (texts, answers):
        for start in range(0, len(samples), batch_size):
            batch = samples[start : start + batch_size]
            batches.append((len(batch) < batch_size, start / len(samples), batch))
    return [sample for *_, batch in sorted(batches, key=lambda of: of[:2]) for sample in batch]
