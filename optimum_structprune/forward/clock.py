"""What each domain costs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter

import torch


class Clock:
    """Seconds by number of domain.

    Args:
        device: That does the work; a GPU is waited for, since it only queues what it is told.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds: dict[int, float] = {}

    @contextmanager
    def running(self, domain: int) -> Iterator[None]:
        """Add the time spent inside `with` to a domain."""
        start = perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds[domain] = self.seconds.get(domain, 0.0) + perf_counter() - start
