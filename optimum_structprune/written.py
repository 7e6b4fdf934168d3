"""Writes files in one step each, and lists those of a result with their hashes, so that nothing else that lies in its
folder, and nothing that has changed, is taken for a part of it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

from .errors import StructPruneError, one_line, warn


LIST_NAME = "written_files.json"


def replace_text(path: Path, text: str) -> None:
    """Write a text to a file, which replaces a former one in one step and becomes part of the result it lies in."""
    _replace(path, text)
    add_to_result(path)


def _replace(path: Path, text: str) -> None:
    new = path.with_name(f".{path.name}.new")
    try:
        new.write_text(text, encoding="utf-8")
        new.replace(path)
    except OSError as error:  # of a full disk, it does not say which file
        new.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error


def written_files(folder: Path) -> dict[str, str]:
    """The hashes of the files of a result, by their paths inside its folder; empty where the folder is no result."""
    try:
        files = json.loads((folder / LIST_NAME).read_text(encoding="utf-8"))["files"]
        return {name: str(files[name]) for name in files if not {"/", ".."} & set(Path(name).parts)}
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return {}


def as_list(files: Mapping[str, str]) -> str:
    """The text of a list of files with their hashes."""
    return json.dumps({"files": files}, indent=2) + "\n"


def list_files(folder: Path, paths: Iterable[Path]) -> None:
    """Enter files into the list of a folder, which is a result from then on."""
    new = {path.relative_to(folder).as_posix(): hash_of(path) for path in sorted(paths) if path.is_file()}
    _replace(folder / LIST_NAME, as_list(written_files(folder) | new))


def add_to_result(path: Path) -> None:
    """Enter a new file into the list of the result in whose folder it lies, if that is one."""
    if written_files(path.parent):
        list_files(path.parent, [path])


def hash_of(path: Path) -> str:
    """The SHA-256 of a whole file: weights that were trained in place have the size and the header of the former."""
    digest = sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def is_unchanged(path: Path) -> bool:
    """Whether a file is as the list of its folder says that it was written."""
    return path.is_file() and written_files(path.parent).get(path.name) == hash_of(path)


def foreign_files(folder: Path) -> list[str]:
    """The files and folders in a result that were not written with it, and its files that have changed since."""
    files = written_files(folder)
    folders = {parent.as_posix() for name in files for parent in Path(name).parents}

    def is_ours(path: Path, name: str) -> bool:
        if path.is_symlink() or path.is_dir():
            return not path.is_symlink() and name in folders
        return name == LIST_NAME or (name in files and path.is_file() and files[name] == hash_of(path))

    named = {path.relative_to(folder): path for path in sorted(folder.rglob("*"))}
    inside = {name: path for name, path in named.items() if name.parent.as_posix() in folders}
    return [name.as_posix() for name, path in inside.items() if not is_ours(path, name.as_posix())]


def check_unchanged(*paths: Path) -> None:
    """Refuse to replace files that are not as they were written with the result that they lie in."""
    for path in paths:
        if path.exists() and not is_unchanged(path):
            raise StructPruneError(
                f"{path} is not as structprune wrote it, so it is not replaced; move it elsewhere, or remove it."
            )


@contextmanager
def warn_on_error(output: str | Path, name: str) -> Iterator[None]:
    """A file beside a result that cannot be made inside `with` only gives a warning."""
    try:
        yield
    except Exception as error:  # hours of work are not given up for a page about them
        warn(f"{output} gets no {name}: {one_line(error)}")


def identity(path: str | Path) -> tuple[int, ...]:
    """What tells a file from another one in its place, and from itself once it is written to; empty if it is gone."""
    try:
        found = os.stat(path)
    except OSError:
        return ()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
