"""What a recovery trains on, text and answers in turn, and what it is measured by."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import deepcopy
from itertools import islice
from math import inf, isfinite
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..config.recovery import RecoveryConfig
from ..domains.packing import Domain
from ..errors import StructPruneError
from ..forward.generation import end_tokens
from ..system.fingerprint import fingerprint
from .answers import Answers, answers_file, prompts_of, writer_of
from .samples import Sample, Teacher, answer_samples, collate, measured, text_sample
from .text import ANSWERS, LEFT_OUT, MEASURED


# The answers that are measured on, of so many tokens at most, are to prompts that are not trained on.
ASIDE, ASIDE_TOKENS = 32, 64
ANSWERS_NAME = "written_answers.jsonl"


class Lessons(Dataset):
    """Texts and answers as the Trainer takes them, evenly mixed. Answers may be written while it trains: each when it
    is first asked for.
    """

    def __init__(self, texts: Sequence[Sample], answers: Iterator[Sample], number: int):
        self.texts, self.number = texts, number
        self._answers, self._written = answers, list[Sample]()

    def close(self) -> None:
        """Let go of who writes: all that is asked for from now on has been written."""
        self._answers = iter(())

    def __len__(self) -> int:
        return len(self.texts) + self.number

    def __getitem__(self, row: int) -> Sample:
        before, after = (at * self.number // len(self) for at in (row, row + 1))
        if before == after:
            return self.texts[row - before]
        while len(self._written) <= before:
            self._written.append(next(self._answers))
        return self._written[before]


class Curriculum:
    """The `lessons` of a recovery, in the order of a seed, and by kind the samples of its `probes`, by which it is
    measured. What is written while it trains, the `student` writes, and a `folder` keeps it.
    """

    def __init__(
        self,
        config: RecoveryConfig,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        taught_by: PreTrainedModel | None,
        seed: int,
        folder: Path,
    ):
        self.config, self.tokenizer, self.taught_by, self.seed = config, tokenizer, taught_by, seed
        self.student: Any = model
        self.folder = folder
        self.teacher = None if taught_by is None else Teacher(taught_by)
        self.prompts: list[list[int]] = []
        self.probes: dict[str, list[Sample]] = {}

    def prepare(self, domains: Sequence[Domain], left_out: Tensor | None, text_seed: int, scratch: Path) -> None:
        """Divide the text, have answers written, and keep in a scratch folder what the teacher predicts."""
        share = 0.0 if self.teacher is None else float(self.config.answer_share)
        counts = [round((1 - share) * len(domain.samples)) for domain in domains]
        texts = torch.cat([domain.samples[:count] for domain, count in zip(domains, counts, strict=True)])
        spare = torch.cat([domain.samples[count:] for domain, count in zip(domains, counts, strict=True)])
        most = max(1, MEASURED // spare.shape[1])
        measured_on = {domain.name: domain.heldout[:most] for domain in domains}
        for name, ids in {**measured_on, **({} if left_out is None else {LEFT_OUT: left_out})}.items():
            self.probes[name] = [text_sample(row) for row in ids]
        if self.teacher is not None:
            self._check_teacher(self.teacher)
        learns = left_out is None or self.config.kl_weight < 1
        self.compared = [domain.name for domain in domains] if learns else [LEFT_OUT]
        answers: Iterator[Sample] = iter(())
        if len(spare):
            answers = self._answers(spare, most, text_seed)
        order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(self.seed))
        self.lessons = Lessons([text_sample(ids) for ids in texts[order]], answers, len(spare))
        if self.teacher is not None:
            written = self.config.writer == "dense"
            fixed = [self.lessons[row] for row in range(len(self.lessons))] if written else self.lessons.texts
            self.teacher.note(fixed, scratch / "states")
            for samples in self.probes.values():
                self.teacher.note(samples)

    def _check_teacher(self, teacher: Teacher) -> None:
        first = next(iter(self.probes.values()))[:1]
        teacher.note(first)
        if not teacher.logits(collate(first)).isfinite().all():
            raise StructPruneError(
                "The teacher's loss on held-out text is not finite, for a weight is not or its dtype is too narrow; "
                "load it again, in float32 or bfloat16, or leave the teacher out."
            )

    def release_teacher(self) -> None:
        """Let go of the teacher where all that it predicts is kept, and of who wrote the answers that are."""
        if self.teacher is not None and self.teacher.head is not None and self.config.writer == "dense":
            self.teacher.model = self.taught_by = None
            self.lessons.close()

    def _answers(self, spare: Tensor, most: int, text_seed: int) -> Iterator[Sample]:
        """The answers that are trained on, as many samples as there are spare texts; some are set aside first."""
        assert self.tokenizer is not None and self.taught_by is not None
        places, number = spare.shape[1] - 1, len(spare)
        prompts = prompts_of(self.config.prompts, self.student, self.tokenizer, spare, text_seed)
        count = min(ASIDE, len(prompts) // 2)
        aside, self.prompts = prompts[:count], prompts[count:]
        dense, known = writer_of(self.taught_by, self.tokenizer), fingerprint(self.taught_by)
        ends = end_tokens(self.taught_by, self.tokenizer)
        kept = answers_file(known, ends, aside, text_seed)
        conversations = Answers(aside, dense, kept, text_seed).conversations(ASIDE_TOKENS)
        self.probes[ANSWERS] = [*islice(answer_samples(conversations, places), most)]
        if self.config.writer == "dense":
            kept = answers_file(known, ends, self.prompts, text_seed)
            return Answers(self.prompts, dense, kept, text_seed).samples(number, places)
        own = Answers(self.prompts, self._as_student, self.folder / ANSWERS_NAME, self.seed)
        return self._noted(own.samples(number, places))

    def _as_student(self, prompts: Sequence[Sequence[int]], length: int, seed: int) -> list[list[int]]:
        """What the student writes as it is now: a copy with its adapter folded in, so that its weights stay exact."""
        assert self.tokenizer is not None
        student = self.student
        if isinstance(student, PeftModel):
            student = deepcopy(student).merge_and_unload()
        return writer_of(student, self.tokenizer)(prompts, length, seed)

    def _noted(self, samples: Iterator[Sample]) -> Iterator[Sample]:
        assert self.teacher is not None
        for sample in samples:
            self.teacher.note([sample])
            yield sample

    def ids(self) -> Tensor:
        """All that decides what is learnt and what is kept, as one row of token ids."""
        written = self.config.writer == "dense"
        lessons = [self.lessons[row] for row in range(len(self.lessons))] if written else self.lessons.texts
        measured_on = [sample for samples in self.probes.values() for sample in samples]
        rows = [sample[name] for sample in [*lessons, *measured_on] for name in ("input_ids", "targets")]
        return torch.cat([*rows, *map(torch.tensor, self.prompts)])

    def measure(self, model: Any) -> dict[str, dict[str, Tensor]]:
        """How a model does on each probe; see `measured`."""
        return {name: measured(model, samples, self.teacher) for name, samples in self.probes.items()}

    def distance(self, model: Any) -> float:
        """How far a model is; see `distance_in`."""
        return self.distance_in({name: measured(model, self.probes[name], self.teacher) for name in self.compared})

    def distance_in(self, found: dict[str, dict[str, Tensor]]) -> float:
        """The mean divergence from the teacher on text of a kind that is left out; where the text is to be learnt, the
        mean loss on text of its kinds. It is infinite where it is not finite.
        """
        what = "divergence" if self.compared == [LEFT_OUT] else "loss"
        mean = float(torch.cat([found[name][what] for name in self.compared]).mean())
        return mean if isfinite(mean) else inf
