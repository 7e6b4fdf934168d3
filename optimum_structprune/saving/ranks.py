"""One process saves, and those beside it wait and get the same outcome."""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from time import monotonic
from typing import Any

import torch.distributed as dist

from ..errors import StructPruneError


logger = logging.getLogger(__name__)

# So long a process waits for the first one to save, and after so long it says so.
PATIENCE = timedelta(hours=2)
NOTICE = timedelta(minutes=1)
# Whether `torchrun` (or accelerate, with it) keeps a store for the processes that it has started.
AGENT_STORE = "TORCHELASTIC_USE_AGENT_STORE"
# How often each folder has been saved by this process: all processes count alike.
_saved: Counter[str] = Counter()


def is_first_rank() -> bool:
    """Whether this process is the one that saves: it is alone, or the first of several."""
    return _rank_and_count()[0] == 0


def is_alone() -> bool:
    """Whether no other process does the same."""
    return _rank_and_count()[1] == 1


def on_first_rank(target: str | Path, work: Callable[[], None]) -> None:
    """Do something in the first process, and wait for it in all others.

    The first process leaves its outcome in the store through which the processes found each other, so it never waits
    for the others: it may as well be the only one that calls this.
    """
    if is_alone():
        work()
        return
    outcome = reporter(target)
    if is_first_rank():
        with outcome:
            work()
    else:
        outcome.wait()


class Outcome:
    """What came of saving a folder in the first of several processes. As a context, in that process, it tells the
    others.
    """

    def __init__(self, name: str, number: int):
        self.name, self.key, self.store = name, f"structprune/{name}/{number}", _store()

    def __enter__(self) -> Outcome:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        reason = ""
        if error is not None:
            reason = str(error) if isinstance(error, StructPruneError) else f"{type(error).__name__}: {error}"
        self.store.set(self.key, json.dumps({"error": reason}))

    def wait(self) -> None:
        """Wait for the first process."""
        start, noticed = monotonic(), False
        while True:
            begun = monotonic()
            try:
                self.store.wait([self.key], NOTICE)
                break
            except RuntimeError as error:
                # A store that has nothing yet fails after the time given, and one that is gone fails at once.
                now = monotonic()
                if now - begun < NOTICE.total_seconds() / 2 or now - start > PATIENCE.total_seconds():
                    raise StructPruneError(f"The first process did not say whether it saved {self.name}.") from error
                if not noticed:
                    logger.warning("Waiting for the first process to save %s.", self.name)
                    noticed = True
        if reason := json.loads(self.store.get(self.key))["error"]:
            raise StructPruneError(reason)


def reporter(target: str | Path) -> Outcome:
    """The outcome of saving a folder once more; every process has to ask for it equally often."""
    name = str(Path(target).resolve())
    _saved[name] += 1
    return Outcome(name, _saved[name])


def _rank_and_count() -> tuple[int, int]:
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    if os.environ.get(AGENT_STORE) == "True" and "RANK" in os.environ:
        return int(os.environ["RANK"]), int(os.environ.get("WORLD_SIZE", "1"))
    return 0, 1


def _store() -> Any:
    if dist.is_initialized():
        return dist.distributed_c10d._get_default_store()
    # Nothing in this run has needed the other processes so far, but `torchrun` has made a store for them.
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    run = os.environ.get("TORCHELASTIC_RUN_ID", "") + os.environ.get("TORCHELASTIC_RESTART_COUNT", "")
    return dist.PrefixStore(f"structprune/{run}", dist.TCPStore(address, port, is_master=False))
