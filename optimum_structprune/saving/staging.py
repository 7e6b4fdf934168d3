"""Writes a folder so that it appears only once everything in it has been written."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from safetensors import SafetensorError

from ..errors import StructPruneError, one_line
from .claims import clear_leftovers, folder_beside, in_use
from .ranks import is_alone, is_first_rank, reporter
from .target import OLD, SAVING, check_file, check_target, resolved


# What the errors of libraries that could not write a file say: torch's, and that of tokenizers.
WRITING = ("inline_container.cc", "PytorchStreamWriter", "(os error ")


@contextmanager
def staged(folder: str | Path, overwrite: bool, used: Iterable[str | Path | None] = ()) -> Iterator[Path]:
    """Give a temporary folder beside the target, and move it into place if everything inside `with` goes well.

    Of several processes, all do what is inside `with`, and that of the first one is kept; the others wait for it and
    fail if it fails.
    """
    if is_alone():
        with staged_alone(folder, overwrite, used) as staging:
            yield staging
        return
    outcome = reporter(folder)
    if is_first_rank():
        with outcome, staged_alone(folder, overwrite, used) as staging:
            yield staging
        return
    with tempfile.TemporaryDirectory() as scratch:
        yield Path(scratch)
    outcome.wait()


@contextmanager
def staged_alone(folder: str | Path, overwrite: bool, used: Iterable[str | Path | None] = ()) -> Iterator[Path]:
    """`staged` for a process that others may be waiting for."""
    target = resolved(folder)  # a link keeps pointing to the folder
    clear_leftovers(target)
    check_target(target, overwrite, used)
    with ExitStack() as stack:
        try:
            staging = stack.enter_context(folder_beside(target, SAVING))
        except OSError as error:
            raise StructPruneError(f"{target} cannot be written: {error.strerror or error}.") from error
        try:
            yield staging
            staging.chmod(0o755)
            _swap(staging, target)
        except Exception as error:
            if not is_write_error(error):
                raise
            reason = one_line(error)
            raise StructPruneError(
                f"{target} could not be written, and what was there is as it was: {reason}"
            ) from error


@contextmanager
def staged_file(path: str | Path, overwrite: bool) -> Iterator[Path]:
    """Give the name of a temporary file beside the target, and move it into place if everything inside `with` goes
    well.
    """
    target = resolved(path)
    clear_leftovers(target)
    check_file(target, overwrite)
    try:
        with folder_beside(target, SAVING) as staging:
            yield staging / target.name
            (staging / target.name).replace(target)
    except Exception as error:
        if not is_write_error(error):
            raise
        raise StructPruneError(f"{target} could not be written: {one_line(error)}") from error


def is_write_error(error: BaseException) -> bool:
    """Whether an error says that a file could not be written, whichever library raised it.

    Torch raises a bare `RuntimeError` and tokenizers a bare `Exception`, which their words tell from others.
    """
    if isinstance(error, (OSError, SafetensorError)):
        return True
    return type(error) in (RuntimeError, Exception) and any(words in str(error) for words in WRITING)


def _swap(staging: Path, target: Path) -> None:
    if not target.exists():
        staging.rename(target)
        return
    # The new folder is in place when the former one goes, so whatever cannot be removed of it is no failure.
    with in_use(target), folder_beside(target, OLD) as former:
        try:
            target.rename(former)
            staging.rename(target)
        except BaseException:
            if not target.exists():
                former.rename(target)
            raise
