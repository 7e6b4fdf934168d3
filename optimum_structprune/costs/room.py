"""A pruning that does not fit is refused before any text is read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..arch.spec import ArchSpec
from ..config.pruning import StructPruneConfig
from ..errors import StructPruneError
from ..system.offloading import compute_device, is_offloaded
from ..system.processes import process_count
from ..widths.budget import widths_of
from .need import ERROR, Need, need
from .workload import workload


MEMORY = Path("/proc/meminfo")  # where Linux says what is free


def free_bytes(device: torch.device) -> int | None:
    """The bytes that a device has free for tensors; None where it does not say."""
    if device.type == "cuda":
        # What torch has reserved and does not use is free for its own tensors.
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type != "cpu" or not MEMORY.exists():
        return None
    lines = dict(line.split(":") for line in MEMORY.read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in lines else None


def check_room(
    config: StructPruneConfig,
    arch: ArchSpec,
    model: PreTrainedModel,
    shapes: PreTrainedModel,
    inplace: bool,
    inputs: Mapping[str, Tensor] | None = None,
) -> None:
    """Refuse a pruning that takes more memory than the device that computes it has free.

    What is estimated is taken at the lower end of its error, so that nothing is refused that fits.
    """
    device = compute_device(model)
    free = free_bytes(device)
    if free is None:
        return
    work = workload(config, arch, shapes, widths_of(config, arch, shapes), shapes.dtype.itemsize, inputs)
    offloaded = is_offloaded(model)
    found = need(work, "disk" if offloaded else None, process_count())
    copy = 0 if inplace or offloaded else work.weights
    least = int(found.above * (1 - ERROR)) + copy
    if least > free:
        raise StructPruneError(_message(config, found, device, least, free, copy, offloaded))


def _message(
    config: StructPruneConfig, found: Need, device: torch.device, least: int, free: int, copy: int, offloaded: bool
) -> str:
    parts = f"{gigabytes(found.hidden)} of hidden states and {gigabytes(found.working)} for {found.stage}"
    parts += f", beside a copy of the model, {gigabytes(copy)}" if copy else ""
    helps = ["inplace=True"] if copy else []
    helps += [] if offloaded or device.type == "cpu" else ["--offload cpu or disk"]
    helps += ["--offload disk"] if not offloaded and device.type == "cpu" else []
    helps += [f"num_samples below {config.num_samples}"] if found.hidden else []
    helps += [f"batch_size below {config.batch_size}"] if config.samples_at_once > 1 else []
    helps += ["criterion='wanda' with refit='none', which take no Gram matrix"] if config.fits else []
    return (
        f"Pruning takes at least {gigabytes(least)} on {device} above the model ({parts}), and {gigabytes(free)} are "
        f"free; what helps is {', '.join(helps[:-1])}{' or ' if helps[:-1] else ''}{helps[-1]}."
    )


def gigabytes(count: float) -> str:
    """A number of bytes in GB, which are 10⁹ bytes, or in MB below one of them."""
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"
