"""The largest batch that the device has room for, where the config leaves it open."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from accelerate.utils import find_executable_batch_size
from transformers import PreTrainedModel

from ..arch.spec import ArchSpec
from ..config.pruning import AUTO
from ..errors import StructPruneError
from ..forward.metrics import evaluating, run_model
from ..pruning.evidence import Evidence
from ..system.offloading import compute_device, is_offloaded
from ..system.processes import process_count
from ..widths.budget import widths_of
from .need import ERROR, need
from .room import free_bytes, gigabytes
from .workload import Workload, workload


MOST = 32  # samples; larger batches brought no more speed wherever it was tried
# A CPU computes no faster with more samples of a few hundred tokens, and what asks for too much there is killed.
MOST_ON_CPU = 4


def with_batch_size(evidence: Evidence, arch: ArchSpec, model: PreTrainedModel) -> Evidence:
    """The evidence with a number in place of `batch_size="auto"` in its config.

    The estimate of the memory chooses where to begin, and a forward pass on the device says whether it fits; where it
    does not, accelerate's `find_executable_batch_size` tries smaller ones.
    """
    config = evidence.config
    if config.batch_size != AUTO:
        return evidence
    device = compute_device(model)
    samples = max((domain.samples for domain in evidence.domains), key=len)
    work = workload(config, arch, model, widths_of(config, arch, model), model.dtype.itemsize)
    most = min(len(samples), MOST_ON_CPU if device.type == "cpu" else MOST)
    start = largest_estimated(work, most, free_bytes(device), is_offloaded(model))
    if device.type == "cpu" or evidence.statistics is not None:
        return _sized(evidence, start)

    base: Any = model.base_model

    @torch.no_grad()
    def attempt(batch_size: int) -> int:
        with evaluating(model):
            run_model(base, samples[:batch_size])
        return batch_size

    try:
        size = find_executable_batch_size(attempt, starting_batch_size=start)()
    except RuntimeError as error:
        free = free_bytes(device)
        has = "" if free is None else f", which has {gigabytes(free)} free,"
        raise StructPruneError(
            f"batch_size='auto' found no batch that {device}{has} has room for: one sample of {samples.shape[1]} "
            "tokens is too much already. Choose a smaller seq_length, or --offload cpu or disk."
        ) from error
    return _sized(evidence, size)


def _sized(evidence: Evidence, batch_size: int) -> Evidence:
    return replace(evidence, config=replace(evidence.config, batch_size=batch_size))


def largest_estimated(work: Workload, most: int, free: int | None, offloaded: bool) -> int:
    """The largest halving of a batch size that is estimated to fit, at least 1."""
    size = max(most, 1)
    while size > 1 and free is not None:
        found = need(
            replace(work, samples=replace(work.samples, batch=size)), "disk" if offloaded else None, process_count()
        )
        if found.above * (1 + ERROR) <= free:
            break
        size //= 2
    return size
