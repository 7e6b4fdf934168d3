"""Writes files in one step each, and lists the files of a result with their hashes.

Nothing else that lies in the folder of a result, and nothing that has changed, is taken for a part of it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager, suppress
from dataclasses import asdict
from hashlib import sha256
from math import isfinite
from pathlib import Path
from typing import Any, cast

from .errors import StructPruneError, one_line, warn


LIST_NAME = "written_files.json"
# The schema version of the files of settings, and of the files of measurements.
FORMAT_VERSION = 1
RECORD_VERSION = 2
VERSION_KEY = "format_version"


def replace_text(path: Path, text: str) -> None:
    """Replace a file by a text in one step; the file becomes part of the result that it lies in."""
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
    """Read the hashes of a result's files by their paths inside its folder; empty if it is no result."""
    try:
        files = json.loads((folder / LIST_NAME).read_text(encoding="utf-8"))["files"]
        return {name: str(files[name]) for name in files if not {"/", ".."} & set(Path(name).parts)}
    except (OSError, ValueError, LookupError, TypeError):
        return {}


def write_file_list(folder: Path, paths: Iterable[Path]) -> None:
    """Enter files into the list of a folder, which is a result from then on."""
    new = {path.relative_to(folder).as_posix(): hash_of(path) for path in sorted(paths) if path.is_file()}
    _replace(folder / LIST_NAME, to_json({"files": written_files(folder) | new}) + "\n")


def add_to_result(path: Path) -> None:
    """Enter a new file into the list of its folder, if that is a result."""
    if written_files(path.parent):
        write_file_list(path.parent, [path])


def hash_of(path: Path) -> str:
    """Hash a whole file by SHA-256: weights that were trained in place have the size and header of the former."""
    digest = sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def is_unchanged(path: Path) -> bool:
    """Is true if a file has the hash that the list of its folder names."""
    return path.is_file() and written_files(path.parent).get(path.name) == hash_of(path)


def foreign_files(folder: Path) -> list[str]:
    """Name the files and folders in a result that were not written with it or have changed since."""
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
    """Refuse to replace files that are not as they were written with their result."""
    for path in paths:
        if path.exists() and not is_unchanged(path):
            raise StructPruneError(f"{path} is not as structprune wrote it; move it elsewhere, or remove it.")


@contextmanager
def warn_on_error(output: str | Path, name: str) -> Iterator[None]:
    """Warn of an error inside `with`, which makes a file beside a result."""
    try:
        yield
    except Exception as error:  # hours of work are not given up for a page about them
        warn(f"{output} gets no {name}: {one_line(error)}")


def versioned(values: Mapping[str, Any], version: int = FORMAT_VERSION) -> dict[str, Any]:
    """Return fields with the schema version in front of them."""
    return {VERSION_KEY: version, **values}


def unversioned(values: Mapping[str, Any], latest: int = FORMAT_VERSION) -> dict[str, Any]:
    """Return fields without the schema version.

    Raises:
        StructPruneError: If the version is later than `latest`.
    """
    version = values.get(VERSION_KEY, 1)
    if type(version) is not int or not 1 <= version <= latest:
        raise StructPruneError(
            f"{VERSION_KEY} {version!r} is not known here, where {latest} is the latest; a newer optimum-structprune "
            "reads it."
        )
    return {name: value for name, value in values.items() if name != VERSION_KEY}


def plain(value: Any) -> Any:
    """Convert a value to the types of JSON: sets to sorted lists, numbers that are not finite to null."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, Set):
        return sorted(map(str, value))
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return float(value) if isfinite(value) else None
    return value if isinstance(value, (str, int, bool, type(None))) else str(value)


def replace_json(path: str | Path, value: Any) -> None:
    """Replace a file by the JSON document of a value in one step."""
    replace_text(Path(path), to_json(value) + "\n")


def to_json(value: Any) -> str:
    """Write a value as a JSON document; see `plain`."""
    return json.dumps(plain(value), indent=2, allow_nan=False)


def whole_lines(path: Path) -> Iterator[Any]:
    """Read the values in a file of JSON lines, without those cut short; a missing file has none."""
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        with suppress(ValueError):
            yield json.loads(line)


class Record:
    """Saves a dataclass as a JSON document."""

    def to_dict(self) -> dict[str, Any]:
        """Give the fields as plain values."""
        return asdict(cast("Any", self))

    def save(self, path: str | Path) -> None:
        """Write JSON; a number that is not finite becomes null."""
        replace_json(path, versioned(self.to_dict()))
