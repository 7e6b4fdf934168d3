"""Write an output in one step, from one run at a time, and never over the files of a user.

A lock and working folders are next to an output. The next run removes the working folders of a killed run.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from glob import escape, glob
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from .errors import StructPruneError, one_line, some_of
from .processes import is_first_rank, rank_zero_first, wait_for_all
from .stages import readable_size
from .written import add_to_result, foreign_files, write_file_list, written_files


logger = logging.getLogger(__name__)

GGUF = ".gguf"
CARD = "README.md"
# The fields of configs that name files to read, in addition to the sources of text.
READ_FIELDS = ("arch_file", "keep_tokens", "prompts", "validation", "pairs")
# The working folders next to an output: for the new files, and for weights that do not fit into memory.
SAVING = "saving"
OFFLOAD = "offload"
# The folders in a working folder for saving: the new result, and for a moment the result that it replaces.
NEW = "new"
FORMER = "former"


class Output:
    """The folder that a run writes. With several processes, the first process checks and writes it.

    Args:
        target: The folder. A link is followed.
        overwrite: Whether an earlier result is replaced. Any other folder with files is refused.
        inputs: Files and folders that the run reads. The output must not contain one of them or be inside one.
    """

    def __init__(self, target: str | Path, overwrite: bool = False, inputs: Iterable[str | Path | None] = ()):
        self.target = target
        self.overwrite = overwrite
        self.inputs = [path for path in inputs if path]
        self.path = resolved(target)

    def check(self, need_bytes: int = 0) -> None:
        """Raise if the target must not be replaced, or the disk lacks the bytes."""
        with rank_zero_first(str(self.path)) as first:
            if first:
                self._check(need_bytes)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the output against other runs inside `with`, and remove the working folders of killed runs."""
        lock: AbstractContextManager[None] = nullcontext()
        if is_first_rank():
            lock = self._locked()

        with lock:
            wait_for_all()  # a working folder of another process must not be removed
            yield

    @contextmanager
    def staged(self, need_bytes: int = 0) -> Iterator[Path]:
        """Yield a new folder, and move it into place at the end of `with` if nothing failed."""
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
                    reason = f"{self.path} could not be written and is unchanged: {one_line(error)}"
                    raise StructPruneError(reason) from error

    @contextmanager
    def sibling(self, purpose: str) -> Iterator[Path]:
        """Yield a working folder next to the output. Call it inside `locked`."""
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
        new = self._staging(folder)
        write_file_list(new, new.rglob("*"))
        if self.path.is_dir():
            self.path.rename(folder / FORMER)
        new.rename(self.path)  # if this fails, `_clear` moves the former result back

    def _clear(self, folder: Path) -> None:
        """Remove a working folder. Restore the former result in it if the output is missing."""
        former_result = folder / FORMER
        if former_result.exists() and not self.path.exists():
            former_result.rename(self.path)
            logger.warning("%s is restored; a run that did not finish had been replacing it.", self.path)
        shutil.rmtree(folder, ignore_errors=True)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self.check_place()
        with _lock(self.path, self.target) as is_new:
            if is_new:
                self._clear_siblings()
            yield

    def _clear_siblings(self) -> None:
        """Remove the working folders of killed runs."""
        name = re.compile(rf"\.{re.escape(self.path.name)}\.({SAVING}|{OFFLOAD})\.\w{{8}}")
        for path in list(self.path.parent.glob(f".{escape(self.path.name)}.*")):
            if name.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
                self._clear(path)

    def check_place(self, need_bytes: int = 0) -> None:
        """Raise if the place is not writable, or lacks the bytes."""
        place = _writable_folder(self.target, self.path.parents)
        available = shutil.disk_usage(place).free
        if need_bytes > available:
            raise StructPruneError(
                f"{self.target} takes about {readable_size(need_bytes)}, and {place} has {readable_size(available)} "
                "left. Choose another output folder, or free some space."
            )

    def _check(self, need_bytes: int) -> None:
        self.check_place(need_bytes)
        try:
            self._check_replaceable()
        except OSError as error:
            raise StructPruneError(f"{self.target} cannot be written to: {error}") from error

    def _check_replaceable(self) -> None:
        folder = self.path
        if not folder.exists():
            return
        if not folder.is_dir():
            raise StructPruneError(f"{self.target} is a file. Choose a folder.")
        if folder == Path.cwd() or folder in Path.cwd().parents:
            raise StructPruneError(
                f"{self.target} is or holds the working directory, {os.getcwd()}. Choose another output folder."
            )
        if not any(folder.iterdir()):
            return
        if not self.overwrite:
            raise StructPruneError(f"{self.target} exists and is not empty. Choose another folder, or --overwrite it.")

        for path in self.inputs:
            if _overlaps(folder, path):
                raise StructPruneError(f"{folder} overlaps with {path}, which this run reads. Choose another folder.")

        if not written_files(folder):
            raise StructPruneError(f"{folder} is not a result of structprune. Choose another output folder.")

        foreign = foreign_files(folder)
        if foreign:
            raise StructPruneError(
                f"{folder} holds files that structprune did not write ({some_of(foreign)}). Move them, or choose "
                "another output folder."
            )


class GGUFOutput(Output):
    """A GGUF file that a run writes, which becomes part of the result in its folder. It may replace any file."""

    def _staging(self, folder: Path) -> Path:
        return super()._staging(folder) / self.path.name

    def _swap(self, folder: Path) -> None:
        self._staging(folder).replace(self.path)
        add_to_result(self.path)

    def _check_replaceable(self) -> None:
        if self.path.is_dir():
            example = Path(self.target, "model.gguf")
            raise StructPruneError(f"{self.target} is a folder. Choose a file in it, such as {example}.")
        if self.path.exists() and not self.overwrite:
            raise StructPruneError(f"The file {self.target} exists. Choose another file, or --overwrite it.")


@contextmanager
def _lock(path: Path, target: str | Path) -> Iterator[bool]:
    """Lock an output inside `with`. Yield False if this process already has the lock."""
    file = path.with_name(f".{path.name}.lock")
    lock = FileLock(file, timeout=0.2, is_singleton=True)
    if lock.is_locked:
        yield False
        return

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise StructPruneError(
            f"Another run writes to {target} now and holds {file}. Wait, or choose another folder."
        ) from error
    except OSError as error:
        raise StructPruneError(f"{target} cannot be written: {error.strerror or error}.") from error

    try:
        yield True
    finally:
        with suppress(OSError):
            file.unlink()  # after the release, another run may have locked it
        lock.release()


def resolved(target: str | Path) -> Path:
    """Return the absolute path of a name, with all links followed."""
    try:
        return Path(os.path.expanduser(target)).resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise StructPruneError(f"{str(target)!r} cannot be written: {error}.") from error


def check_folder(folder: str | Path) -> None:
    """Raise if a folder is not writable. It need not exist."""
    if is_first_rank():
        path = resolved(folder)
        _writable_folder(folder, [path] + list(path.parents))


def _writable_folder(target: str | Path, places: Iterable[Path]) -> Path:
    """Return the first existing folder of `places`, or raise if it is not writable."""
    try:
        place = next(path for path in places if path.exists())
        if not place.is_dir():
            raise StructPruneError(f"{target} cannot be created: {place} is a file. Choose another folder.")
        Path(tempfile.mkdtemp(prefix=f".{resolved(target).name}.{SAVING}.", dir=place)).rmdir()
    except OSError as error:
        raise StructPruneError(f"{target} cannot be written: {error.strerror or error}.") from error

    return place


@contextmanager
def write_errors(folder: Path) -> Iterator[None]:
    """Raise `StructPruneError` if files of a folder that a later run completes cannot be written."""
    try:
        yield
    except Exception as error:
        if not is_write_error(error):
            raise
        raise StructPruneError(
            f"{folder} could not be written: {one_line(error)}. Free some space, and run the command again, which "
            "resumes."
        ) from error


def is_write_error(error: BaseException) -> bool:
    """Return whether an error means that a file could not be written."""
    if isinstance(error, (OSError, SafetensorError)):
        return True
    # torch and tokenizers have no error types for this.
    texts = ("inline_container.cc", "PytorchStreamWriter", "iostream error", "(os error ")
    return type(error) in (RuntimeError, Exception) and any(text in str(error) for text in texts)


def used_paths(*configs: Any) -> list[str]:
    """Return the files and folders that configs name, for `Output.inputs`."""
    names: list[Any] = []
    for config in _with_recoveries(configs):
        names += [domain.source for domain in getattr(config, "domains", None) or ()]
        names += [getattr(config, name, None) for name in READ_FIELDS]
        names += _working_folders(config).values()

    paths: list[str] = []
    for name in names:
        if isinstance(name, (str, Path)):
            path = os.path.expanduser(name)
            paths += glob(path, recursive=True) or [path]
    return paths


def check_apart(target: str | Path, *configs: Any) -> None:
    """Raise if checkpoints would be written inside the output folder, which the result replaces as a whole."""
    folder = resolved(target)

    for config in _with_recoveries(configs):
        for field, path in _working_folders(config).items():
            working_folder = resolved(path)
            if folder == working_folder or folder in working_folder.parents:
                raise StructPruneError(
                    f"{field} {path} is inside the output folder {target}. Choose a folder outside of it."
                )


def _with_recoveries(configs: Iterable[Any]) -> Iterator[Any]:
    """Yield configs, and the configs of the recoveries in them."""
    for config in configs:
        for part in (config, getattr(config, "recovery", None)):
            if part is not None:
                yield part


def _working_folders(config: Any) -> dict[str, Any]:
    """Return the folders for the checkpoints of a run, by the names of the config's fields."""
    training = getattr(config, "training", None) or {}
    folders = {"checkpoint_dir": getattr(config, "checkpoint_dir", None), "output_dir": training.get("output_dir")}
    return {field: path for field, path in folders.items() if path}


def remove_checkpoints(folder: str | Path) -> None:
    """Remove the checkpoints of a training from a folder. Remove the folder too if it has no other files."""
    for path in Path(folder).glob("checkpoint-*"):
        if (path / "trainer_state.json").is_file() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
    with suppress(OSError):
        Path(folder).rmdir()


def _overlaps(folder: Path, name: str | Path) -> bool:
    """Return whether a folder contains an input path, equals it, or is inside it. The input may be no path at all."""
    try:
        path = Path(os.path.abspath(os.path.expanduser(name)))
        if not path.exists():
            return False

        real_path = path.resolve()
        if real_path in folder.parents and real_path.is_dir() and real_path != Path(real_path.anchor):
            return True
        return any(folder == place or folder in place.parents for place in (path, real_path))
    except (OSError, ValueError, RuntimeError):
        return False
