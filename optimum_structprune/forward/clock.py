"""The time that each domain takes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter

import torch


class Clock:
    """Measures the seconds that are spent on each domain.

    Args:
        device: The device that does the work. A GPU runs behind the program, so the clock waits for it.

    Attributes:
        seconds: The seconds by number of the domain.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds: dict[int, float] = {}

    @contextmanager
    def running(self, domain: int) -> Iterator[None]:
        """Add the time that is spent inside `with` to a domain.

        Args:
            domain: The number of the domain that was running.
        """
        start = perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds[domain] = self.seconds.get(domain, 0.0) + perf_counter() - start
