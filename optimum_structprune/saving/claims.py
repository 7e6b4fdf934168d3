"""What a run keeps beside its output while it lasts: a lock, and temporary folders that the next run clears away if
this one is killed.

The kernel releases a lock when its process ends, however it ends. So what is locked is in use, and what is not has
been left behind.
"""

from __future__ import annotations

import glob
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import StructPruneError
from .ranks import is_first_rank
from .target import LEFTOVERS, OLD, probe_target, resolved


try:
    import fcntl
except ImportError:  # there is none on Windows, where nothing is refused and nothing cleared away
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)


@contextmanager
def claimed(target: str | Path) -> Iterator[None]:
    """Keep other runs from the same output inside `with`, and clear away what those that were killed have left there.

    Of several processes that a launcher has started, the first one does so for all.
    """
    if not is_first_rank():
        yield
        return
    probe_target(target)
    folder = resolved(target)
    path, missing = folder.with_name(f".{folder.name}.lock"), [path for path in folder.parents if not path.exists()]
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _locked_file(path)
    except OSError as error:
        raise StructPruneError(f"{target} cannot be written: {error.strerror or error}.") from error
    if descriptor is None:
        raise StructPruneError(
            f"Another run writes to {target} now: process {_owner(path)}, which holds {path}. Wait for it, or name "
            "another output folder."
        )
    try:
        clear_leftovers(folder)
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is locked, so that it is nobody else's
        os.close(descriptor)
        for empty in missing:
            with suppress(OSError):  # the result is in it
                empty.rmdir()


@contextmanager
def folder_beside(target: Path, purpose: str) -> Iterator[Path]:
    """A temporary folder beside a target, which `clear_leftovers` leaves alone inside `with`."""
    target.parent.mkdir(parents=True, exist_ok=True)
    folder, descriptor = None, None
    while folder is None or not folder.exists():  # it may be taken for a leftover before it is locked
        _release(descriptor)
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.{purpose}.", dir=target.parent))
        descriptor = _lock(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        _release(descriptor)


@contextmanager
def in_use(folder: Path) -> Iterator[None]:
    """A folder is not taken for a leftover inside `with`, whatever its name."""
    descriptor = _lock(folder)
    try:
        yield
    finally:
        _release(descriptor)


def clear_leftovers(target: Path) -> None:
    """Remove the temporary folders beside a target that no process uses, and put back a result that a kill has caught
    between its removal and its replacement.
    """
    purposes = "|".join(LEFTOVERS)
    # What a folder that is being written needs for itself has a name made of its name.
    ours = re.compile(rf"\.{{1,2}}{re.escape(target.name)}\.({purposes})\.\w{{8}}(\.({purposes})\.\w{{8}})?")
    for path in [*target.parent.glob(f".*{glob.escape(target.name)}.*")]:
        found = ours.fullmatch(path.name)
        if found is None or path.is_symlink() or not path.is_dir():
            continue
        descriptor = _lock(path, wait=False)
        if descriptor is None:
            continue
        if found[1] == OLD and not target.exists() and any(path.iterdir()):
            path.rename(target)
            logger.warning("%s is back, which a run that was killed had been replacing.", target)
        else:
            shutil.rmtree(path, ignore_errors=True)
        _release(descriptor)


def _locked_file(path: Path) -> int | None:
    """A descriptor of a file that this process has locked; None where another one has."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if fcntl is not None:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        except OSError as error:
            logger.warning("%s cannot be locked (%s), so another run into the same output is not seen.", path, error)
        # A run that ends between the two calls removes the file, and another may have made it anew.
        if _is(path, descriptor):
            break
        os.close(descriptor)
    with suppress(OSError):  # the number serves a message only
        os.ftruncate(descriptor, 0)
        os.write(descriptor, str(os.getpid()).encode())
    return descriptor


def _is(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _owner(path: Path) -> str:
    try:
        return path.read_text() or "?"
    except OSError:
        return "?"


def _lock(folder: Path, wait: bool = True) -> int | None:
    """A descriptor of a folder that this process has locked; None where that cannot be."""
    if fcntl is None:
        return None
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _release(descriptor: int | None) -> None:
    if descriptor is not None:
        os.close(descriptor)
