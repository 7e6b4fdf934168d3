"""Writes an output in one step, from one run at a time, and never over files of the user.

A lock and working folders lie beside an output. The next run clears away what a killed one left.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from errno import ENOLCK, ENOSYS, ENOTSUP
from glob import escape, glob
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from ..errors import StructPruneError, one_line, some_of
from ..written import add_to_result, foreign_files, write_file_list, written_files
from .processes import is_first_rank, rank_zero_first, wait_for_all
from .stages import readable_size


logger = logging.getLogger(__name__)

GGUF = ".gguf"
CARD = "README.md"
# The fields of configs, beside the sources of text, that name files which a run reads.
READ_FIELDS = ("arch_file", "keep_tokens", "prompts", "validation")
# Working folders beside an output: for what is being written, and for weights that do not fit into memory.
SAVING, OFFLOAD = "saving", "offload"
NEW, FORMER = "new", "former"  # in one for saving: the result, and for a moment the one that it replaces


class Output:
    """A folder that a run makes; a link is followed to its target.

    What it holds is replaced only with `overwrite`, if only this package wrote it, and if it shares no files with
    those in `used`, which the run reads, links inside these included. Of several processes, the first one decides.
    """

    def __init__(self, target: str | Path, overwrite: bool = False, used: Iterable[str | Path | None] = ()):
        self.target, self.overwrite, self.used = target, overwrite, [*used]
        self.path = resolved(target)

    def check(self, need_bytes: int = 0) -> None:
        """Refuse a protected target, and one without enough room, before any work."""
        with rank_zero_first(str(self.path)) as first:
            if first:
                self._check(need_bytes)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other runs from the same output inside `with`, and clear away what killed ones left."""
        with self._locked() if is_first_rank() else nullcontext():
            wait_for_all()  # so that no working folder is taken for one that was left
            yield

    @contextmanager
    def staged(self, need_bytes: int = 0) -> Iterator[Path]:
        """Give a new folder, which the first process moves into place if nothing fails inside `with`."""
        with rank_zero_first(str(self.path)) as first:
            if not first:
                with tempfile.TemporaryDirectory() as scratch:
                    yield self._staging(Path(scratch))
                return
            with self._locked():
                self._check(need_bytes)
                try:
                    with self.sibling(SAVING) as folder:
                        yield self._staging(folder)
                        self._swap(folder)
                except Exception as error:
                    if not is_write_error(error):
                        raise
                    reason = f"{self.path} could not be written, and what was there is as it was: {one_line(error)}"
                    raise StructPruneError(reason) from error

    @contextmanager
    def sibling(self, purpose: str) -> Iterator[Path]:
        """Make a working folder beside the output, inside `locked`."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{self.path.name}.{purpose}.", dir=self.path.parent))
        try:
            yield folder
        finally:
            self._clear(folder)

    def _staging(self, folder: Path) -> Path:
        (folder / NEW).mkdir(exist_ok=True)
        return folder / NEW

    def _swap(self, folder: Path) -> None:
        write_file_list(self._staging(folder), self._staging(folder).rglob("*"))
        # Whatever stops the second move, `_clear` takes the first one back.
        if self.path.is_dir():
            self.path.rename(folder / FORMER)
        self._staging(folder).rename(self.path)

    def _clear(self, folder: Path) -> None:
        """Remove a working folder; a former result in it goes back if nothing has taken its place."""
        if (folder / FORMER).exists() and not self.path.exists():
            (folder / FORMER).rename(self.path)
            logger.warning("%s is back, which a run had been replacing that did not come to its end.", self.path)
        shutil.rmtree(folder, ignore_errors=True)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self.check_place()
        with _lock(self.path, self.target) as is_new:
            working = re.compile(rf"\.{re.escape(self.path.name)}\.({SAVING}|{OFFLOAD})\.\w{{8}}")
            for path in [*self.path.parent.glob(f".{escape(self.path.name)}.*")] if is_new else []:
                if working.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
                    self._clear(path)
            yield

    def check_place(self, need_bytes: int = 0) -> None:
        """Refuse a place that could not be written to the end, whatever is there."""
        if os.path.ismount(self.path):
            raise StructPruneError(f"{self.target} is where a file system is mounted; name a folder inside it.")
        place, free = _nearest(self.target, self.path.parents)
        if need_bytes > free:
            sizes = f"takes about {readable_size(need_bytes)}, and {place} has {readable_size(free)} left"
            raise StructPruneError(f"{self.target} {sizes}; name another output folder, or make room.")

    def _check(self, need_bytes: int) -> None:
        self.check_place(need_bytes)
        try:
            self._check_replaceable()
        except OSError as error:
            raise StructPruneError(f"{self.target} cannot be written to: {error}") from error

    def _check_replaceable(self) -> None:
        folder = self.path
        if folder.exists() and not folder.is_dir():
            raise StructPruneError(f"{self.target} is a file; name a folder.")
        if folder.exists() and folder in (Path.cwd(), *Path.cwd().parents):
            place = f"{self.target} is or holds the working directory, {os.getcwd()}"
            raise StructPruneError(f"{place}, and would be replaced; name another output folder.")
        if not folder.exists() or not any(folder.iterdir()):
            return
        if not self.overwrite:
            raise StructPruneError(f"{self.target} exists and is not empty; choose another, or --overwrite it.")
        if shared := next((name for name in self.used if name and _shares_files(folder, name)), None):
            reason = f"shares files with {shared}, which this run reads"
        elif not written_files(folder):
            reason = "is no result of structprune"
        elif foreign := foreign_files(folder):
            reason = f"holds what is not as structprune wrote it ({some_of(foreign)})"
        else:
            return
        raise StructPruneError(f"{folder} {reason}, so it is not overwritten; name another output folder.")


class GGUFOutput(Output):
    """A GGUF file that a run makes, as part of its folder's result; `overwrite` replaces any file."""

    def _staging(self, folder: Path) -> Path:
        return super()._staging(folder) / self.path.name

    def _swap(self, folder: Path) -> None:
        self._staging(folder).replace(self.path)
        add_to_result(self.path)

    def _check_replaceable(self) -> None:
        file, example = self.path, Path(self.target, "model.gguf")
        if file.is_dir():
            raise StructPruneError(f"{self.target} is a folder; name a file in it, such as {example}.")
        if file.exists() and not self.overwrite:
            raise StructPruneError(f"The file {self.target} exists; choose another, or overwrite it (--overwrite).")


@contextmanager
def _lock(path: Path, shown: str | Path) -> Iterator[bool]:
    """Lock an output inside `with`; gives True if it is locked here and was not before, further out."""
    name = path.with_name(f".{path.name}.lock")
    lock = FileLock(name, timeout=0.2, is_singleton=True)  # in which a run that is just ending may give it back
    if lock.is_locked:
        yield False
        return
    missing = [folder for folder in path.parents if not folder.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise StructPruneError(
            f"Another run writes to {shown} now and holds {name}. Wait, or name another folder."
        ) from error
    except OSError as error:
        if error.errno not in (ENOLCK, ENOSYS, ENOTSUP):  # of file systems without locks
            raise StructPruneError(f"{shown} cannot be written: {error.strerror or error}.") from error
        logger.warning("%s cannot be locked (%s), so another run into the same output is not seen.", name, error)
    try:
        yield lock.is_locked
    finally:
        with suppress(OSError):
            name.unlink()  # while it is locked, so that it is nobody else's
        lock.release()
        for empty in missing:
            with suppress(OSError):  # the result is in it
                empty.rmdir()


def resolved(target: str | Path) -> Path:
    """Follow a name over all links to its absolute path."""
    try:
        path = Path(os.path.expanduser(target)).resolve()
        str(path).encode()  # safetensors, for one, takes no other names
        return path
    except UnicodeEncodeError as error:
        raise StructPruneError(f"{str(target)!r} cannot be written: its path is not text in UTF-8.") from error
    except (OSError, RuntimeError, ValueError) as error:
        raise StructPruneError(f"{str(target)!r} cannot be written: {error}.") from error


def check_folder(folder: str | Path) -> None:
    """Refuse a folder in which no file could be written; of several processes the first one decides."""
    if is_first_rank():
        path = resolved(folder)
        _nearest(folder, (path, *path.parents))


def _nearest(shown: str | Path, places: Iterable[Path]) -> tuple[Path, int]:
    """Find the first of some folders that exists, and its free bytes; a read-only one is refused."""
    try:
        place = next(path for path in places if path.exists())
        if not place.is_dir():
            raise StructPruneError(f"{shown} cannot be made: {place} is a file; name another folder.")
        Path(tempfile.mkdtemp(prefix=f".{resolved(shown).name}.{SAVING}.", dir=place)).rmdir()
        return place, shutil.disk_usage(place).free
    except OSError as error:
        raise StructPruneError(f"{shown} cannot be written: {error.strerror or error}.") from error


@contextmanager
def unchanging(name: str | Path) -> Iterator[None]:
    """Refuse a model that was read inside `with` if the weights in its folder were replaced meanwhile."""

    def identities() -> dict[Path, tuple[int, ...]]:
        found = {path: path.stat() for path in Path(name).glob("*.safetensors") if path.exists()}
        if pipe := next((path for path in found if not path.is_file()), None):  # to read one may take for ever
            raise StructPruneError(f"{pipe} is no regular file; name a model whose weights are.")
        return {path: (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns) for path, stat in found.items()}

    before = identities()
    yield
    if identities() != before:
        raise StructPruneError(f"{name} was written to while this run read it; run it again.")


def is_write_error(error: BaseException) -> bool:
    """Is true if a file could not be written; errors of torch and tokenizers say it in words."""
    said = ("inline_container.cc", "PytorchStreamWriter", "iostream error", "(os error ")
    in_words = type(error) in (RuntimeError, Exception) and any(words in str(error) for words in said)
    return in_words or isinstance(error, (OSError, SafetensorError))


def used_paths(*configs: Any) -> list[str]:
    """List the files and folders that configs name, for `Output.used`: text, checkpoints and the like."""
    names: list[Any] = []
    for config, folders in _with_folders(configs):
        names += [domain.source for domain in getattr(config, "domains", None) or ()]
        names += [*folders.values(), *(getattr(config, name, None) for name in READ_FIELDS)]
    paths = [os.path.expanduser(name) for name in names if isinstance(name, (str, Path))]
    return [match for path in paths for match in (glob(path, recursive=True) or [path])]


def check_apart(target: str | Path, *configs: Any) -> None:
    """Refuse an output folder in which the run would write something else: the result replaces all of it."""
    folder = resolved(target)
    for _, folders in _with_folders(configs):
        for name, path in folders.items():
            if path and folder in (resolved(path), *resolved(path).parents):
                raise StructPruneError(f"{name} {path} lies in the output folder {target}; name a folder beside it.")


def _with_folders(configs: Iterable[Any]) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Yield configs, and those of the recoveries in them, with the folders that a run writes to, by field."""
    for config in filter(None, (part for each in configs for part in (each, getattr(each, "recovery", None)))):
        training, progress = getattr(config, "training", None) or {}, getattr(config, "checkpoint_dir", None)
        yield config, {"checkpoint_dir": progress, "output_dir": training.get("output_dir")}


def remove_checkpoints(folder: str | Path) -> None:
    """Remove the checkpoints of a training from a folder, and the folder if nothing else is in it."""
    for path in Path(folder).glob("checkpoint-*"):
        if (path / "trainer_state.json").is_file() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
    with suppress(OSError):  # it is not there, or not empty
        Path(folder).rmdir()


def _shares_files(folder: Path, name: str | Path) -> bool:
    """Is true if a folder overlaps with an input path, links inside the latter included."""
    try:
        read = Path(os.path.abspath(os.path.expanduser(name)))
        if not read.exists():
            return False
        # A link counts at its own place too: with the folder it would go.
        places = [read, read.resolve()]
        if any(place in folder.parents and place != Path(place.anchor) for place in places):
            return True
        places += [Path(os.path.realpath(path)) for path in read.rglob("*") if path.is_symlink()]
        return any(folder in (place, *place.parents) for place in places)
    except (OSError, ValueError, RuntimeError):  # a text that is no path
        return False
