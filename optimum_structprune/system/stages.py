"""Announce and time the stages of a run, show their progress, and measure and free memory."""

from __future__ import annotations

import ctypes
import logging
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from time import perf_counter
from typing import TYPE_CHECKING, Any

from .errors import capitalized


if TYPE_CHECKING:
    from torch import nn


# The announcements of stages, by the names that reports have.
ANNOUNCEMENTS = {
    "answers": "Answering questions",
    "channels": "Removing hidden channels",
    "domains": "Reading text",
    "experts": "Removing experts",
    "languages": "Measuring languages",
    "layers": "Removing layers",
    "unseen text": "Reading unseen text",
    "perplexity": "Measuring the model",
    "recovery": "Recovering the model",
    "search": "Choosing widths",
    "teacher": "Writing predictions",
    "training": "Training",
    "vocabulary": "Choosing tokens",
    "writing": "Generating text",
}
SIZE_UNITS = ("bytes", "kB", "MB", "GB")
# The logger gets the beginning of each stage, and its progress if no bar can be drawn.
logger = logging.getLogger(__name__)
# If no bar can be drawn, progress is logged when this many seconds have passed without a line.
MAX_SILENT_SECONDS = 10.0
_last_line = [perf_counter()]
# The labels of the iterations that log their progress now. The first one contains the others.
_iterations: list[str] = []
# The seconds by stage of the enclosing stages, and the announcement of the innermost stage.
_enclosing: ContextVar[dict[str, float] | None] = ContextVar("enclosing", default=None)
_announcement: ContextVar[str] = ContextVar("announcement", default=ANNOUNCEMENTS["perplexity"])
_last_announcement = [""]


@contextmanager
def stage(name: str, seconds: dict[str, float] | None = None) -> Iterator[None]:
    """Announce a stage the first time and after other stages, and time it inside `with`.

    Args:
        name: The name of the stage.
        seconds: The seconds by stage. The time is added to them, without the time of inner stages. The default is the
            seconds of the enclosing stage.
    """
    times = seconds
    if times is None:
        times = _enclosing.get()
    if times is None:
        times = {}

    announcement = ANNOUNCEMENTS.get(name, capitalized(name))
    if name not in times or announcement != _last_announcement[0]:
        _last_announcement[0] = announcement
        say(f"{announcement} …")

    token = _enclosing.set(times)
    announcement_token = _announcement.set(announcement)
    total_at_start = sum(times.values())
    start = perf_counter()

    try:
        yield
    finally:
        _enclosing.reset(token)
        _announcement.reset(announcement_token)
        inner = sum(times.values()) - total_at_start
        times[name] = times.get(name, 0.0) + perf_counter() - start - inner


def say(line: str) -> None:
    """Log a line. If logging is off, write it to standard error, above the bars, unless bars are disabled."""
    _last_line[0] = perf_counter()
    if logger.isEnabledFor(logging.INFO):
        logger.info(line)
    elif _bars() is not None:
        from tqdm import tqdm

        tqdm.write(line, file=sys.stderr)


def progress(iterable: Iterable[Any], desc: str = "", note: Callable[[], str] = str, **options: Any) -> Iterator[Any]:
    """Iterate with the progress bar of transformers, or with lines of progress if there is no terminal.

    Args:
        iterable: The items.
        desc: The label; by default the announcement of the stage.
        note: A function that returns a remark for the end of the bar or of a line.
        options: Options of tqdm.
    """
    desc = desc or _announcement.get()
    bars = _bars()
    is_terminal = getattr(sys.stderr, "isatty", bool)()
    in_notebook = "ipykernel" in sys.modules
    if bars is not None and (is_terminal or in_notebook):
        return _bar(bars.tqdm(iterable, desc=desc, **options), note)
    return _lines(iterable, desc, note, **options)


def _bars() -> Any:
    """Return the module of transformers that draws bars, or None if it is not imported or bars are disabled."""
    bars: Any = sys.modules.get("transformers.utils.logging")
    if bars is None or not bars.is_progress_bar_enabled():
        return None

    return bars


def _bar(bar: Any, note: Callable[[], str]) -> Iterator[Any]:
    """Iterate over a bar, and show the note at its end."""
    for item in bar:
        yield item
        bar.set_postfix_str(note(), refresh=False)


def _lines(
    iterable: Any,
    desc: str,
    note: Callable[[], str],
    total: int | None = None,
    initial: int = 0,
    unit: str = "step",
    **options: Any,
) -> Iterator[Any]:
    """Iterate, and log the finished steps and the time left after `MAX_SILENT_SECONDS` without a line.

    Inside another iteration, only steps that take longer than `MAX_SILENT_SECONDS` in all are logged.
    """
    total = total or len(iterable)
    units = f"{unit}s"
    if unit.endswith("ch"):
        units = f"{unit}es"

    start = perf_counter()
    last_line = start
    if not _iterations:
        last_line = _last_line[0]

    _iterations.append(desc)
    try:
        for done, item in enumerate(iterable, start=initial + 1):
            yield item

            now = perf_counter()
            if now - last_line >= MAX_SILENT_SECONDS and done < total:
                last_line = now
                parts = [f"{desc}: {done} of {total} {units}", note()]
                seconds = (now - start) * (total - done) / (done - initial)
                parts.append(f"about {readable_time(seconds)} left")
                say(", ".join(filter(None, parts)))
    finally:
        _iterations.remove(desc)


def give_back_free_memory() -> None:
    """Return free memory of the C library to the system. Otherwise, it keeps blocks of up to 32 MB."""
    if sys.platform != "linux":
        return

    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def model_bytes(model: nn.Module) -> int:
    """Return the bytes of a model's weights on the disk. A tensor that has several names counts once."""
    tensors = {tensor.data_ptr() or id(tensor): tensor for tensor in model.state_dict(keep_vars=True).values()}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def saved_bytes(model: nn.Module, itemsize: int) -> int:
    """Return the bytes of the parameters and buffers that a model saves, also of a model without weights.

    Args:
        model: The model.
        itemsize: The bytes of a floating-point number.
    """
    tensors = {id(tensor): tensor for tensor in model.state_dict(keep_vars=True).values()}

    size = 0
    for tensor in tensors.values():
        if tensor.is_floating_point():
            size += tensor.numel() * itemsize
        else:
            size += tensor.numel() * tensor.element_size()
    return size


def readable_size(size: int) -> str:
    """Format a number of bytes in the largest unit that does not exceed it."""
    power = min((len(str(size)) - 1) // 3, len(SIZE_UNITS) - 1)
    if power == 0:
        return f"{size:,} {SIZE_UNITS[0]}"
    return f"{size / 1000**power:,.1f} {SIZE_UNITS[power]}"


def readable_time(seconds: float) -> str:
    """Format a duration in seconds, minutes or hours."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 100 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
