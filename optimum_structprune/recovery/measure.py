"""Measure a model against its teacher on samples, and enter the figures into the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn.functional import cross_entropy

from ..forward.metrics import KINDS_DIFFER, divergence, evaluating
from ..record.figures import ORIGINAL, PRUNED, RECOVERED, Figure, TextResult, perplexity_result, unseen_of
from ..record.report import CurvePoint, RecoveryReport
from ..system.stages import progress
from .aligned_batches import AlignedTargets
from .attach import IGNORED, bare_model, next_tokens
from .chunked_loss import chunk_tokens, device_kind
from .samples import Sample, SampleCollator
from .teacher import Teacher, accepted_inputs
from .text import OTHER_TEXT


# Values by sample, each of shape `(samples,)`, fp64, on the CPU: the number of counted `tokens`, and means over these
# tokens in nats, the `loss` of the model, and with a teacher the loss of the `teacher` and the divergence `kl`.
Values = dict[str, Tensor]
# Values by kind of text.
Measurements = dict[str, Values]

# Tokens in a batch by the kind of device.
BATCH_TOKENS = {"cpu": 1_024, "gpu": 16_384}


def measure_all(
    model: Any,
    measured: Mapping[str, Sequence[Sample]],
    collator: SampleCollator,
    teacher: Teacher | None,
    accelerator: Accelerator,
) -> Measurements:
    """Measure a model on each kind of text."""
    bar = progress(list(measured.items()), desc="Measuring the model", unit="text", leave=False)
    return {kind: measure_samples(model, samples, collator, teacher, accelerator) for kind, samples in bar}


@torch.no_grad()
def measure_samples(
    model: Any,
    samples: Sequence[Sample],
    collator: SampleCollator,
    teacher: Teacher | None,
    accelerator: Accelerator,
) -> Values:
    """Measure a model on samples, in the precision of the training.

    Args:
        model: The model.
        samples: The samples, in the teacher's tokens.
        collator: The collator of the training.
        teacher: The teacher, or None.
        accelerator: The Accelerator of the training.
    """
    if teacher is not None:
        teacher.place(accelerator)
    longest = max(len(sample["input_ids"]) for sample in samples)
    batch_size = max(1, BATCH_TOKENS[device_kind(accelerator.device)] // longest)

    by_name: dict[str, list[Tensor]] = {}
    with evaluating(model), accelerator.autocast():
        for start in range(0, len(samples), batch_size):
            batch = collator(samples[start : start + batch_size])
            values = _measure_batch(model, batch, teacher, accelerator.device)
            for name, value in values.items():
                by_name.setdefault(name, []).append(value)

    # All batches are copied to the CPU at once, so that the device does not wait in between.
    return {name: torch.cat(parts).double().cpu() for name, parts in by_name.items()}


def _measure_batch(model: Any, batch: dict[str, Tensor], teacher: Teacher | None, device: torch.device) -> Values:
    """Return the values of the samples of a batch, on the device."""
    batch = {name: value.to(device) for name, value in batch.items()}
    targets = next_tokens(batch).flatten()
    positions = (targets != IGNORED).nonzero()[:, 0]

    aligned = None
    predictions = None
    if teacher is not None:
        if teacher.alignment is None:
            inputs = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"]}
            predictions = teacher.predict(inputs, positions)
        else:
            aligned = AlignedTargets.of(batch, positions)
            predictions = teacher.predict(aligned.teacher_inputs, aligned.teacher_positions)

    inputs = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"]}
    logits = model(**accepted_inputs(bare_model(model), inputs)).logits.flatten(0, 1)
    logits = logits[positions.to(logits.device)]
    targets = targets[positions].to(logits.device)

    losses: dict[str, list[Tensor]] = {"loss": []}
    size = chunk_tokens(logits.shape[-1], logits.device)
    if aligned is not None and teacher is not None and teacher.alignment is not None:
        aligned.split(teacher.alignment, size, logits.device)

    for start in range(0, max(len(logits), 1), size):
        end = min(start + size, len(logits))
        values = logits[start:end].float()
        losses["loss"].append(cross_entropy(values, targets[start:end], reduction="none"))
        if predictions is None or teacher is None:
            continue
        if aligned is None:
            teacher_logits = predictions.logits(start, end, values.device).float()
            teacher_loss = cross_entropy(teacher_logits, targets[start:end], reduction="none")
            losses.setdefault("kl", []).append(divergence(values, teacher_logits, mean=False))
            losses.setdefault("teacher", []).append(teacher_loss)
        else:
            assert teacher.alignment is not None
            kl = aligned.divergence(teacher.alignment, values.log_softmax(-1), predictions, 1.0, start // size)
            losses.setdefault("kl", []).append(kl)

    by_position = {name: torch.cat(parts).to(device) for name, parts in losses.items()}
    samples = len(batch["input_ids"])
    rows = positions // batch["input_ids"].shape[1]
    if aligned is not None:
        assert predictions is not None
        by_position["teacher"] = aligned.teacher_losses(predictions, size).to(device)
    return _means(by_position, rows, samples, aligned)


def _means(by_position: dict[str, Tensor], rows: Tensor, samples: int, aligned: AlignedTargets | None) -> Values:
    """Average values over the counted tokens of each sample. If the models have different tokens, count the teacher's.

    Args:
        by_position: The values by name, in the order of the positions.
        rows: The number of the sample of each position of the student.
        samples: The number of samples.
        aligned: The positions of the teacher if it has other tokens.
    """
    token_rows = rows
    if aligned is not None:
        token_rows = aligned.teacher_samples
    tokens = _sums_by_row(torch.ones_like(token_rows, dtype=torch.float32), token_rows, samples)

    means = {"tokens": tokens}
    for name, values in by_position.items():
        value_rows = rows
        if name == "teacher":
            value_rows = token_rows
        means[name] = _sums_by_row(values.float(), value_rows, samples) / tokens.clamp(min=1)
    return means


def _sums_by_row(values: Tensor, rows: Tensor, num_rows: int) -> Tensor:
    """Return the sum of the values of each row, shape `(num_rows,)`."""
    return torch.zeros(num_rows, device=rows.device).index_add(0, rows, values)


def validation_loss(measurements: Measurements, kinds: Sequence[str], value: str) -> float:
    """Return the mean of a value over all samples of some kinds of text."""
    return float(torch.cat([measurements[kind][value] for kind in kinds]).mean())


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
        if "kl" in pruned_values:
            pruned_kl = float(pruned_values["kl"].mean())
            recovered_kl = float(recovered[kind]["kl"].mean())
            result.divergence = Figure.of({PRUNED: pruned_kl, RECOVERED: recovered_kl})

        if kind == OTHER_TEXT:
            report.unseen = unseen_of(result, "")
        elif result != TextResult():
            report.domains[kind] = result


def _perplexity(kind: str, pruned: Values, recovered: Values) -> TextResult:
    """Return the perplexities of the teacher, the pruned and the recovered model on one kind of text."""
    losses: dict[str, Tensor] = {}
    if "teacher" in pruned:
        losses[ORIGINAL] = pruned["teacher"]
    losses[PRUNED] = pruned["loss"]
    losses[RECOVERED] = recovered["loss"]

    spread = 0.0
    if kind == OTHER_TEXT:
        spread = KINDS_DIFFER
    return perplexity_result(losses, int(pruned["tokens"].sum()), spread=spread)


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
