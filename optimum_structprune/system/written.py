"""Write files in one step each, and keep a list of the files of a result."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar

from .codec import plain_fields, to_plain
from .errors import StructPruneError, one_line, warn


LIST_NAME = "written_files.json"
# The schema version of the files of settings, and of the files of measurements.
FORMAT_VERSION = 1
RECORD_VERSION = 3
VERSION_KEY = "format_version"
PRESET = "preset:"  # the prefix of a source that names a preset


def replace_text(path: Path, text: str) -> None:
    """Replace a file by a text in one step. The file becomes part of the result in its folder."""
    _replace(path, text)
    add_to_result(path)


def _replace(path: Path, text: str) -> None:
    """Write a text to a temporary file, and rename it."""
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

    # A changed list must not name files outside of the folder.
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
    """Warn instead of raising an error inside `with`, for a file that a result can do without."""
    try:
        yield
    except Exception as error:  # a page about a result is not worth losing hours of work
        warn(f"{name} of {output} is missing: {one_line(error)}")


def versioned(values: Mapping[str, Any], version: int = FORMAT_VERSION) -> dict[str, Any]:
    """Return fields with the schema version as the first field."""
    fields: dict[str, Any] = {VERSION_KEY: version}
    fields.update(values)
    return fields


def unversioned(values: Mapping[str, Any], expected: int = FORMAT_VERSION) -> dict[str, Any]:
    """Return fields without the schema version, which is 1 if it is not named.

    Raises:
        StructPruneError: If the version is another than `expected`.
    """
    version = values.get(VERSION_KEY, 1)
    if type(version) is not int or version != expected:
        raise StructPruneError(
            f"{VERSION_KEY} {version!r} is unknown, and this version of optimum-structprune reads {expected}. Install "
            "the version that wrote the file."
        )

    return {name: value for name, value in values.items() if name != VERSION_KEY}


def replace_json(path: str | Path, value: Any) -> None:
    """Replace a file by the JSON document of a value in one step."""
    replace_text(Path(path), to_json(value) + "\n")


def without_folders(value: Any) -> Any:
    """Replace every absolute path in plain values by its last part, because records may be published."""
    if isinstance(value, Mapping):
        return {key: without_folders(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_folders(item) for item in value]
    if not isinstance(value, str):
        return value

    if value.startswith(PRESET):
        return PRESET + without_folders(value.removeprefix(PRESET))

    parts = Path(value).parts
    is_path = len(parts) > 2 and Path(parts[0]).is_absolute() and Path(parts[0], parts[1]).exists()
    if not is_path:
        return value
    return parts[-1]


def to_json(value: Any) -> str:
    """Return the JSON document of a value; see `to_plain`."""
    return json.dumps(to_plain(value), indent=2, allow_nan=False)


def whole_lines(path: Path) -> Iterator[Any]:
    """Yield the values in a file of JSON lines. Skip incomplete lines, and yield nothing if there is no file."""
    if not path.is_file():
        return

    for line in path.read_bytes().splitlines():
        with suppress(ValueError):
            yield json.loads(line)


class Record:
    """Base class of dataclasses that are saved as JSON documents.

    Attributes:
        version: The schema version of the documents.
    """

    version: ClassVar[int] = FORMAT_VERSION

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values, without fields that are None."""
        return plain_fields(self)

    def save(self, path: str | Path) -> None:
        """Write the record as JSON. NaN and infinity become null."""
        replace_json(path, versioned(self.to_dict(), self.version))
