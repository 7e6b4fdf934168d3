"""The time that each domain takes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter

import torch


class Clock:
    """Measures the seconds that are spent on each domain."""

    def __init__(self, device: torch.device):
        self.device = device
        self._seconds: dict[int, float] = {}
        self._events: list[tuple[int, torch.cuda.Event, torch.cuda.Event]] = []

    @property
    def seconds(self) -> dict[int, float]:
        """The seconds by number of the domain."""
        if self._events:
            torch.cuda.synchronize(self.device)
        for domain, start, end in self._events:
            self._add(domain, start.elapsed_time(end) / 1000)
        self._events.clear()
        return self._seconds

    @contextmanager
    def running(self, domain: int) -> Iterator[None]:
        """Add the time that is spent inside `with` to a domain."""
        if self.device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            stream = torch.cuda.current_stream(self.device)
            begin.record(stream)
            yield
            end.record(stream)
            self._events.append((domain, begin, end))
            return
        start = perf_counter()
        yield
        self._add(domain, perf_counter() - start)

    def _add(self, domain: int, seconds: float) -> None:
        self._seconds[domain] = self._seconds.get(domain, 0.0) + seconds
