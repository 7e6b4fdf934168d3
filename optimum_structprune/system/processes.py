"""Share one pruning among several processes inside `across_processes`. Each process runs a part of the samples."""

from __future__ import annotations

import atexit
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence, Sized
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from importlib import import_module
from typing import TYPE_CHECKING, Any, TypeVar

from .errors import StructPruneError


if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T", "Tensor", Sequence)
V = TypeVar("V")
DONE = "done"  # the outcome of the first process, if it raised no error
_shares_work = False
# The number of outcomes of the first process, by name. All processes count, because it is part of a key in the store.
_decisions: Counter[str] = Counter()


@contextmanager
def _sharing(shares_work: bool) -> Iterator[None]:
    """Set whether the processes share the work inside `with`."""
    global _shares_work
    outer = _shares_work
    _shares_work = shares_work

    try:
        yield
    finally:
        _shares_work = outer


@contextmanager
def across_processes() -> Iterator[None]:
    """Share the work inside `with` among the processes that `torchrun` or `accelerate launch` has started.

    All processes must make the same calls with the same arguments inside. A single process does all work itself.

    Raises:
        StructPruneError: If the processes were started to shard the model; see `check_launch`.
    """
    check_launch()
    if launched("WORLD_SIZE", 1) > 1 and not _initialized():  # a single process may still choose its device
        has_gpu = import_module("torch").cuda.is_available()
        import_module("accelerate").PartialState(cpu=not has_gpu)
        atexit.register(_disconnect)

    with _sharing(_initialized() and _dist().get_world_size() > 1):
        yield


def _disconnect() -> None:
    """Destroy the process group. A process that ends with a group may abort in a thread of the group."""
    if _initialized():
        _dist().destroy_process_group()


def launched(variable: str, default: int) -> int:
    """Return a number from the environment of a launched process, such as `RANK`."""
    text = os.environ.get(variable, str(default))
    if not (text.isascii() and text.isdecimal()):
        raise StructPruneError(f"The environment has {variable}={text!r}, where a launcher sets a number. Unset it.")
    return int(text)


def check_launch() -> None:
    """Raise `StructPruneError` if the launch shards models, because then only one process loads weights."""
    for variable, name in (("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed")):
        if os.environ.get(variable, "false").lower() in ("1", "true", "yes"):
            raise StructPruneError(
                f"accelerate is set to use {name}, so every process has only a part of the weights. Launch with "
                "torchrun, or with `accelerate launch --multi_gpu`; on CPUs, set ACCELERATE_USE_CPU=true."
            )


def unshared() -> AbstractContextManager[None]:
    """Let every process do all work inside `with`, for libraries that divide it among processes themselves."""
    return _sharing(False)


def process_count() -> int:
    """Return the number of processes that share the work."""
    if not _shares_work:
        return 1
    return _dist().get_world_size()


def process_index() -> int:
    """Return the index of this process, from 0."""
    if not _shares_work:
        return 0
    return _dist().get_rank()


def every_process_runs(samples: Sized) -> bool:
    """Return whether all processes run the same samples, because there are fewer samples than processes."""
    return len(samples) < process_count()


def shard(samples: T) -> T:
    """Return the samples that this process runs: every N-th sample, or all with fewer samples than N processes."""
    if every_process_runs(samples):
        return samples
    return samples[process_index() :: process_count()]


def all_reduce_(tensors: Iterable[Tensor]) -> None:
    """Replace tensors by their sums over all processes. The processes wait for each other here."""
    if not _shares_work:
        return

    for tensor in tensors:
        with _on_backend(tensor) as buffer:
            _dist().all_reduce(buffer)


def broadcast_(tensor: Tensor) -> Tensor:
    """Overwrite a tensor with its values in the first process, and return it."""
    if _shares_work:
        with _on_backend(tensor) as buffer:
            _dist().broadcast(buffer, 0)
    return tensor


@contextmanager
def _on_backend(tensor: Tensor) -> Iterator[Tensor]:
    """Yield a tensor that the backend can send, and copy its values back at the end of `with`.

    NCCL only sends tensors on GPUs, so a tensor on the CPU is sent as a copy on the GPU of the process.
    """
    tensor = tensor.detach()
    if tensor.device.type != "cpu" or _dist().get_backend() != "nccl":
        yield tensor
        return

    device = import_module("torch").cuda.current_device()
    buffer = tensor.to(f"cuda:{device}")
    yield buffer
    tensor.copy_(buffer)


def broadcast_object(value: V) -> V:
    """Return the value of the first process in every process."""
    values = [value]
    if _shares_work:
        _dist().broadcast_object_list(values, 0)
    return values[0]


def gather_objects(value: V) -> list[V]:
    """Return the values of all processes, in order, in every process."""
    values = [value] * process_count()
    if _shares_work:
        _dist().all_gather_object(values, value)
    return values


def wait_for_all() -> None:
    """Wait for all processes."""
    if _shares_work:
        _dist().barrier()


def is_first_rank() -> bool:
    """Return whether this process saves: it is a single process, or the first process of a launch."""
    rank, _ = _rank_and_count()
    return rank == 0


@contextmanager
def rank_zero_first(name: str) -> Iterator[bool]:
    """Yield True in the first process. The other processes wait for its outcome and raise its error.

    The outcome is in the store of the launch, so the first process need not wait for the others.
    """
    rank, count = _rank_and_count()
    if count == 1:
        yield True
        return

    _decisions[name] += 1
    key = f"structprune/{name}/{_decisions[name]}"
    store = _store()

    if rank == 0:
        try:
            yield True
        except BaseException as error:
            message = str(error)
            if not isinstance(error, StructPruneError):
                message = f"{type(error).__name__}: {error}"
            store.set(key, message)
            raise
        store.set(key, DONE)
        return

    yield False
    try:
        store.wait([key], timedelta(hours=2))
        outcome = store.get(key).decode()
    except RuntimeError as error:  # the store is closed, or the wait has timed out
        raise StructPruneError(f"The first process did not report the outcome of {name}.") from error

    if outcome != DONE:
        raise StructPruneError(outcome)


def _dist() -> Any:
    # Imported late, because torch takes seconds and the first checks of a command do not need it.
    return import_module("torch.distributed")


def _initialized() -> bool:
    dist = sys.modules.get("torch.distributed")
    return dist is not None and dist.is_available() and dist.is_initialized()


def _rank_and_count() -> tuple[int, int]:
    if _initialized():
        return _dist().get_rank(), _dist().get_world_size()

    # `torchrun` keeps a store for the processes that it has started, also when accelerate calls it.
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and "RANK" in os.environ:
        return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])

    return 0, 1


def _store() -> Any:
    dist = _dist()
    if _initialized():
        return dist.distributed_c10d._get_default_store()

    # torch.distributed is not initialized yet, but `torchrun` has a store for its processes.
    address = os.environ["MASTER_ADDR"]
    port = int(os.environ["MASTER_PORT"])
    run = os.environ.get("TORCHELASTIC_RUN_ID", "") + os.environ.get("TORCHELASTIC_RESTART_COUNT", "")
    return dist.PrefixStore(f"structprune/{run}", dist.TCPStore(address, port, is_master=False))
