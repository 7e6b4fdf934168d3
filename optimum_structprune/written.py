"""Write files in one step each, and keep a list of the files of a result."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager, suppress
from dataclasses import asdict
from math import isfinite
from pathlib import Path
from typing import Any, cast

from .errors import StructPruneError, one_line, warn


LIST_NAME = "written_files.json"
# The schema version of the files of settings, and of the files of measurements.
FORMAT_VERSION = 1
RECORD_VERSION = 2
VERSION_KEY = "format_version"
PRESET = "preset:"  # before the file of a preset


def replace_text(path: Path, text: str) -> None:
    """Replace a file by a text in one step. The file becomes part of the result that it lies in."""
    _replace(path, text)
    add_to_result(path)


def _replace(path: Path, text: str) -> None:
    new = path.with_name(f".{path.name}.new")
    try:
        new.write_text(text, encoding="utf-8")
        new.replace(path)
    except OSError as error:  # the error of a full disk does not name the file
        new.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error


def written_files(folder: Path) -> list[str]:
    """Return the files of a result by their paths inside its folder, or an empty list for any other folder."""
    try:
        names = list(json.loads((folder / LIST_NAME).read_text(encoding="utf-8"))["files"])
    except (OSError, ValueError, LookupError, TypeError):
        return []
    return [name for name in names if isinstance(name, str) and not {"/", ".."} & set(Path(name).parts)]


def write_file_list(folder: Path, paths: Iterable[Path]) -> None:
    """Add files to the list of a folder, which makes the folder a result."""
    names = {path.relative_to(folder).as_posix() for path in paths if path.is_file()}
    names.update(written_files(folder))
    _replace(folder / LIST_NAME, to_json({"files": sorted(names)}) + "\n")


def add_to_result(path: Path) -> None:
    """Add a new file to the list of its folder, if the folder is a result."""
    if written_files(path.parent):
        write_file_list(path.parent, [path])


def foreign_files(folder: Path) -> list[str]:
    """Return the names of the files and folders directly in a result that were not written with it."""
    names = {Path(name).parts[0] for name in written_files(folder)}
    names.add(LIST_NAME)
    return sorted(path.name for path in folder.iterdir() if path.name not in names)


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


def without_folders(value: Any) -> Any:
    """Return plain values with every absolute path replaced by its last part, since records may be published."""
    if isinstance(value, Mapping):
        return {key: without_folders(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_folders(item) for item in value]
    if not isinstance(value, str):
        return value
    prefix = PRESET if value.startswith(PRESET) else ""
    parts = Path(value.removeprefix(prefix)).parts
    is_path = len(parts) > 2 and Path(parts[0]).is_absolute() and Path(parts[0], parts[1]).exists()
    return f"{prefix}{parts[-1]}" if is_path else value


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
