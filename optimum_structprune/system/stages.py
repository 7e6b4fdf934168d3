"""What a run costs: its stages, which are announced and timed, and the memory that it and its model take."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from time import perf_counter
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from torch import nn

try:
    import resource
except ImportError:  # Windows has no such module
    resource = None  # type: ignore[assignment]


UNITS = ("bytes", "kB", "MB", "GB")
# Says each stage when it begins, for whoever has no progress bar to look at.
logger = logging.getLogger(__name__)
# The seconds by stage that the stages around this place add to.
_around: ContextVar[dict[str, float] | None] = ContextVar("around", default=None)


@contextmanager
def stage(name: str, seconds: dict[str, float] | None = None) -> Iterator[None]:
    """Announce a stage that begins for the first time, and add its own time to `seconds`, or to those around it."""
    outer = _around.get()
    times = seconds if seconds is not None else {} if outer is None else outer
    if name not in times:
        logger.info("%s …", name)
    inside, start = _around.set(times), perf_counter()
    before = sum(times.values())
    try:
        yield
    finally:
        _around.reset(inside)
        within = sum(times.values()) - before
        times[name] = times.get(name, 0.0) + perf_counter() - start - within


def peak_memory() -> dict[str, int]:
    """The most bytes that this process has held at a time, on the `cpu` and on `cuda`, as far as it can be known."""
    import torch

    peaks = {}
    if resource is not None:
        # Linux counts in kB, macOS in bytes.
        unit = 1 if sys.platform == "darwin" else 1024
        peaks["cpu"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        peaks["cuda"] = max(map(torch.cuda.max_memory_allocated, range(torch.cuda.device_count())))
    return peaks


def model_bytes(model: nn.Module) -> int:
    """The size of a model's weights on the disk; what several names share counts once."""
    tensors = {tensor.data_ptr() or id(tensor): tensor for tensor in model.state_dict().values()}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def readable_size(size: int) -> str:
    """A number of bytes in the largest unit that leaves a digit before the point."""
    power = min((len(str(size)) - 1) // 3, len(UNITS) - 1)
    return f"{size:,} {UNITS[0]}" if power == 0 else f"{size / 1000**power:,.1f} {UNITS[power]}"
