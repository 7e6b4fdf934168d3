"""How much memory this process has taken and a model takes, and sizes in words."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from torch import nn

try:
    import resource
except ImportError:  # Windows has no such module
    resource = None  # type: ignore[assignment]

UNITS = ("bytes", "kB", "MB", "GB")


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
