"""Read the free memory of a device, and choose the number of rows that it computes at a time.

The defaults for a CPU are small, because a CPU is fastest on data that fits its caches. A GPU needs larger pieces of
work, because a kernel over a few tokens leaves most of it idle.
"""

from __future__ import annotations

import platform
import re
from pathlib import Path

import psutil
import torch


# A GPU takes at most this many times the rows that a CPU takes.
GPU_FACTOR = 16
# The share of a GPU's memory that one piece of work, such as the logits of a few tokens, may fill.
PIECE_OF_MEMORY = 1 / 64


def default_device() -> torch.device:
    """Return the GPU if there is one, and the CPU otherwise."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("cpu")


def machine_name(device: torch.device) -> str:
    """Return the name of the processor that a device is."""
    if device.type == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_name(device)

    # platform.processor() has no name of the model on Linux.
    info = Path("/proc/cpuinfo")
    names: list[str] = []
    if info.is_file():
        names = re.findall(r"^model name\s*: (.*)$", info.read_text(), re.MULTILINE)
    names.append(platform.processor() or platform.machine())
    return names[0]


def total_bytes(device: torch.device) -> int | None:
    """Return the memory of a GPU in bytes, or None for a device of another type."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_properties(device).total_memory


def free_bytes(device: torch.device) -> int | None:
    """Return the bytes that a device has free for tensors, or None if they are unknown."""
    if device.type == "cuda" and torch.cuda.is_available():
        # Memory that torch has reserved and does not use is free for its tensors.
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type == "cpu":
        return psutil.virtual_memory().available
    return None


def rows_at_once(device: torch.device, bytes_per_row: int, on_cpu: int) -> int:
    """Return the number of rows, such as the logits of tokens, to compute at a time.

    Args:
        device: The device that computes them.
        bytes_per_row: The bytes of one row.
        on_cpu: The number of rows on a CPU, and on a device whose memory is unknown. A GPU takes up to 16 times as
            many, as long as they fill at most 1/64 of its memory.
    """
    memory = total_bytes(device)
    if memory is None:
        return on_cpu

    fitting = int(memory * PIECE_OF_MEMORY) // max(bytes_per_row, 1)
    return min(max(fitting, on_cpu), GPU_FACTOR * on_cpu)
