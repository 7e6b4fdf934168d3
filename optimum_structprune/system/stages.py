"""The stages of a run, which are announced and timed."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from time import perf_counter


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
