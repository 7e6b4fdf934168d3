"""Measure a model against its teacher on samples, and enter the figures into the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isnan
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from ..arch.meta import positions_of
from ..distillation.chunked_loss import device_kind
from ..distillation.placement import is_sharded
from ..distillation.teacher import Teacher
from ..distillation.teacher_file import StoredTeacher
from ..measure import losses
from ..measure.batches import Sample, SampleCollator
from ..measure.losses import Losses
from ..measure.predictions import Predictor
from ..measure.text import Text
from ..record.figures import ORIGINAL, PRUNED, RECOVERED, UNSEEN_TEXT, Figure, TextResult, perplexity_result, unseen_of
from ..record.report import CurvePoint, RecoveryReport
from ..system.errors import StructPruneError
from ..system.margins import KINDS_DIFFER


# The values of a model by kind of text, in the tokens of the teacher.
Measurements = dict[str, Losses]

# Tokens in a batch by the kind of device.
BATCH_TOKENS = {"cpu": 1_024, "gpu": 16_384}


def measure_all(
    model: Any,
    measured: Mapping[str, Sequence[Sample]],
    teacher: Teacher | StoredTeacher | None,
    accelerator: Accelerator,
) -> Measurements:
    """Measure a model on each kind of text, in the precision of the training.

    Args:
        model: The model.
        measured: The samples by kind of text, in the teacher's tokens.
        teacher: The teacher, or None.
        accelerator: The Accelerator of the training.
    """
    alignment = None
    if teacher is not None:
        teacher.place(accelerator)
        alignment = teacher.alignment

    # A sample that is too long for the model raises an error.
    collator = SampleCollator(alignment, positions_of(model))
    for samples in measured.values():
        collator(samples)

    texts = {kind: _text_of(samples) for kind, samples in measured.items()}
    predictor = Predictor(model, whole=is_sharded(accelerator))
    tokens = BATCH_TOKENS[device_kind(accelerator.device)]
    with accelerator.autocast():
        return losses.measure_all(predictor, texts, teacher, alignment, tokens=tokens)


def _text_of(samples: Sequence[Sample]) -> Text:
    """Return training samples as text."""
    tensors = {name: [torch.tensor(sample[name]) for sample in samples] for name in samples[0]}
    return Text(tensors["input_ids"], labels=tensors["labels"], positions=tensors["position_ids"])


def validation_loss(measurements: Measurements, kinds: Sequence[str], value: str) -> float:
    """Return the mean over all samples of some kinds of text of `loss` or `kl`."""
    by_kind = [losses.means(getattr(measurements[kind], value)) for kind in kinds]
    return float(torch.cat(by_kind).mean())


def check_loss(loss: float) -> None:
    """Raise `StructPruneError` if the loss before a training is NaN, which no learning rate has caused."""
    if isnan(loss):
        raise StructPruneError(
            "The loss of the model is NaN before the first step, so the model or its teacher computes NaN. Load both "
            "in float32 or bfloat16, and check their weights."
        )


def enter_measurements(
    report: RecoveryReport, pruned: Measurements, recovered: Measurements, chosen: set[str]
) -> None:
    """Enter the figures of a model before and after a training into its report.

    Args:
        report: The report.
        pruned: The measurements of the pruned model.
        recovered: The measurements of the recovered model.
        chosen: The kinds of text that compared checkpoints. They have no perplexity in the report.
    """
    for kind, pruned_values in pruned.items():
        result = TextResult()
        if kind not in chosen:
            result = _perplexity(kind, pruned_values, recovered[kind])
        if pruned_values.kl:
            pruned_kl = float(losses.means(pruned_values.kl).mean())
            recovered_kl = float(losses.means(recovered[kind].kl).mean())
            result.divergence = Figure.of({PRUNED: pruned_kl, RECOVERED: recovered_kl})

        if kind == UNSEEN_TEXT:
            report.unseen = unseen_of(result, "")
        elif result != TextResult():
            report.domains[kind] = result


def _perplexity(kind: str, pruned: Losses, recovered: Losses) -> TextResult:
    """Return the perplexities of the teacher, the pruned and the recovered model on one kind of text."""
    by_model: dict[str, Tensor] = {}
    if pruned.other:
        by_model[ORIGINAL] = losses.means(pruned.other)
    by_model[PRUNED] = losses.means(pruned.loss)
    by_model[RECOVERED] = losses.means(recovered.loss)

    spread = 0.0
    if kind == UNSEEN_TEXT:
        spread = KINDS_DIFFER
    return perplexity_result(by_model, sum(len(row) for row in pruned.loss), spread=spread)


def enter_curve(report: RecoveryReport, log: Sequence[Mapping[str, Any]]) -> None:
    """Enter the KL divergence from the teacher during a training into its report.

    Args:
        report: The report, with the tokens and the steps of the training.
        log: The log of the Trainer.
    """
    for entry in log:
        kl = entry.get("eval_kl")
        if kl is not None:
            tokens = report.tokens * entry["step"] / max(report.steps, 1)
            report.curve.append(CurvePoint(round(tokens), float(kl)))
