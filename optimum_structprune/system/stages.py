"""Announces and times the stages of a run, shows how far they are, and measures and frees its memory."""

from __future__ import annotations

import ctypes
import logging
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from time import perf_counter
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from torch import nn


SIZE_UNITS = ("bytes", "kB", "MB", "GB")
# Says each stage when it begins, and without a terminal how far it is.
logger = logging.getLogger(__name__)
# Where no bar can be drawn, a line says how far the work is after so many seconds without one.
MAX_SILENT_SECONDS = 10.0
_last_line = [perf_counter()]
# The seconds by stage that the stages around this place add to.
_around: ContextVar[dict[str, float] | None] = ContextVar("around", default=None)


@contextmanager
def stage(name: str, seconds: dict[str, float] | None = None) -> Iterator[None]:
    """Announce a stage the first time, and add its time to `seconds`, or to those of the stage around it."""
    outer = _around.get()
    times = seconds if seconds is not None else {} if outer is None else outer
    if name not in times:
        say(f"{name} …")
    inside, start = _around.set(times), perf_counter()
    before = sum(times.values())
    try:
        yield
    finally:
        _around.reset(inside)
        within = sum(times.values()) - before
        times[name] = times.get(name, 0.0) + perf_counter() - start - within


def say(line: str) -> None:
    """Log a line, or write it to the standard error where bars are shown and none is drawn."""
    _last_line[0] = perf_counter()
    if logger.isEnabledFor(logging.INFO):
        logger.info(line)
    elif _bars() is not None:
        from tqdm.auto import tqdm

        if not getattr(tqdm, "_instances", ()):
            sys.stderr.write(f"{line}\n")


def progress(iterable: Iterable[Any], **options: Any) -> Iterator[Any]:
    """Draw the progress bar of transformers, with the options of tqdm; without a terminal, write lines."""
    bars = _bars()
    if bars is not None and (getattr(sys.stderr, "isatty", bool)() or "ipykernel" in sys.modules):
        return iter(bars.tqdm(iterable, **options))
    return _lines(iterable, **options)


def _bars() -> Any:
    """Give the module of transformers that draws bars; None if it has not been imported, or draws none."""
    bars: Any = sys.modules.get("transformers.utils.logging")
    return bars if bars is not None and bars.is_progress_bar_enabled() else None


def _lines(
    iterable: Any, desc: str, total: int | None = None, initial: int = 0, unit: str = "step", **options: Any
) -> Iterator[Any]:
    """Say in place of a bar how many steps are done, once nothing was said for `MAX_SILENT_SECONDS`."""
    total, units = total or len(iterable), f"{unit}es" if unit.endswith("ch") else f"{unit}s"
    for done, each in enumerate(iterable, start=initial + 1):
        yield each
        if perf_counter() - _last_line[0] >= MAX_SILENT_SECONDS and done < total:
            say(f"{desc}: {done} of {total} {units}")


def give_back_free_memory() -> None:
    """Have the C library give free memory back to the system; it would keep blocks of up to 32 MB."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def model_bytes(model: nn.Module) -> int:
    """Compute the bytes of a model's weights on the disk; what several names share counts once."""
    tensors = {tensor.data_ptr() or id(tensor): tensor for tensor in model.state_dict(keep_vars=True).values()}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def readable_size(size: int) -> str:
    """Write a number of bytes in the largest unit that leaves a digit before the point."""
    power = min((len(str(size)) - 1) // 3, len(SIZE_UNITS) - 1)
    return f"{size:,} {SIZE_UNITS[0]}" if power == 0 else f"{size / 1000**power:,.1f} {SIZE_UNITS[power]}"
