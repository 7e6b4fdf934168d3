"""What the machine has free: a pruning that does not fit is refused before any text is read, and a batch is found that
fits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import psutil
import torch
from accelerate.utils import find_executable_batch_size
from torch import Tensor
from transformers import PreTrainedModel

from ..arch.spec import ArchSpec, Widths
from ..config.pruning import AUTO, StructPruneConfig
from ..errors import StructPruneError
from ..forward.metrics import evaluating, run_model
from ..pruning.evidence import Evidence
from ..system.memory import readable_size
from ..system.offloading import compute_device, is_offloaded
from ..system.processes import process_count
from .need import ERROR, Need, Text, Workload


MOST = 32  # samples; larger batches brought no more speed wherever it was tried
# A CPU computes no faster with more samples of a few hundred tokens, and what asks for too much there is killed.
MOST_ON_CPU = 4


def free_bytes(device: torch.device) -> int | None:
    """The bytes that a device has free for tensors; None where it does not say."""
    if device.type == "cuda":
        # What torch has reserved and does not use is free for its own tensors.
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return psutil.virtual_memory().available if device.type == "cpu" else None


def check_room(
    config: StructPruneConfig,
    arch: ArchSpec,
    model: PreTrainedModel,
    shapes: PreTrainedModel,
    widths: Widths,
    inplace: bool,
    inputs: Mapping[str, Tensor] | None = None,
) -> None:
    """Refuse a pruning that takes more memory than the device that computes it has free.

    What is estimated is taken at the lower end of its error, so that nothing is refused that fits.
    """
    device = compute_device(model)
    free = free_bytes(device)
    work = Workload(config, arch, shapes, widths, shapes.dtype.itemsize, Text.of(config, inputs))
    offloaded = is_offloaded(model)
    need = work.need("disk" if offloaded else None, process_count())
    copy = 0 if inplace or offloaded else work.weights
    least = int(need.above * (1 - ERROR)) + copy
    beside = f", beside a copy of the model, {readable_size(copy)}" if copy else ""
    if free is not None and least > free:
        advice = " or ".join(_advice(config, need, device, copy, offloaded))
        raise StructPruneError(
            f"Pruning takes at least {readable_size(least)} on {device} above the model ({readable_size(need.hidden)} "
            f"of hidden states and {readable_size(need.working)} for {need.stage}{beside}), and {readable_size(free)} "
            f"are free; what helps is {advice}."
        )


def _advice(config: StructPruneConfig, need: Need, device: torch.device, copy: int, offloaded: bool) -> list[str]:
    advice = {
        "inplace=True": copy > 0,
        f"--offload {'disk' if device.type == 'cpu' else 'cpu or disk'}": not offloaded,
        f"num_samples below {config.num_samples}": need.hidden > 0,
        f"batch_size below {config.batch_size}": config.samples_at_once > 1,
        "criterion='wanda' with refit='none', which take no Gram matrix": config.fits,
    }
    return [text for text, helps in advice.items() if helps] or ["a device with more memory"]


def with_batch_size(evidence: Evidence, arch: ArchSpec, model: PreTrainedModel, widths: Widths) -> Evidence:
    """The evidence with a batch size that fits, where the config says `batch_size="auto"`.

    The estimate of the memory chooses where to begin, and a forward pass on the device says whether it fits; where it
    does not, accelerate's `find_executable_batch_size` tries smaller ones.
    """
    config = evidence.config
    if config.batch_size != AUTO:
        return evidence
    device = compute_device(model)
    base: Any = model.base_model
    samples = max((domain.samples for domain in evidence.domains), key=len)
    work = Workload(config, arch, model, widths, model.dtype.itemsize, Text.of(config))
    most = min(len(samples), MOST_ON_CPU if device.type == "cpu" else MOST)
    start = largest_estimated(work, most, free_bytes(device), is_offloaded(model))

    @torch.no_grad()
    def attempt(batch_size: int) -> int:
        with evaluating(model):
            run_model(base, samples[:batch_size])
        return batch_size

    try:
        silent = device.type == "cpu" or evidence.statistics is not None  # no error says that a batch is too large
        size = start if silent else find_executable_batch_size(attempt, starting_batch_size=start)()
    except RuntimeError as error:
        free = free_bytes(device)
        raise StructPruneError(
            f"batch_size='auto' found no batch that {device} has room for"
            f"{'' if free is None else f' in {readable_size(free)}'}: one sample of {samples.shape[1]} tokens is too "
            "much already. Choose a smaller seq_length, or --offload cpu or disk."
        ) from error
    return replace(evidence, batch_size=size)


def largest_estimated(work: Workload, most: int, free: int | None, offloaded: bool) -> int:
    """The largest halving of a batch size that is estimated to fit, at least 1."""
    size = max(most, 1)
    while size > 1 and free is not None:
        need = replace(work, text=work.text._replace(batch=size)).need("disk" if offloaded else None, process_count())
        if need.above * (1 + ERROR) <= free:
            break
        size //= 2
    return size
