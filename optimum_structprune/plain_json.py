"""Values as JSON that every reader takes: Python's own would write `NaN` and `Infinity`, which JSON does not have."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import asdict
from math import isfinite
from pathlib import Path
from typing import Any, cast

from .errors import StructPruneError
from .written import replace_text


# The version of the form of every file that this package writes.
FORMAT_VERSION = 1
VERSION_KEY = "format_version"


def versioned(values: Mapping[str, Any]) -> dict[str, Any]:
    """Fields with the version of their form before them."""
    return {VERSION_KEY: FORMAT_VERSION, **values}


def unversioned(values: Mapping[str, Any]) -> dict[str, Any]:
    """Fields without the version of their form."""
    version = values.get(VERSION_KEY, FORMAT_VERSION)
    if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
        raise StructPruneError(
            f"{VERSION_KEY} {version!r} is not known here, where {FORMAT_VERSION} is the latest; a newer "
            "optimum-structprune reads it."
        )
    return {name: value for name, value in values.items() if name != VERSION_KEY}


def plain(value: Any) -> Any:
    """A value in the types of JSON: sets are sorted lists, other objects their text, what is not finite null."""
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
    """Write the JSON document of a value to a file, which replaces a former one in one step."""
    replace_text(Path(path), to_json(value) + "\n")


def to_json(value: Any) -> str:
    """The JSON document of a value, see `plain`."""
    return json.dumps(plain(value), indent=2, allow_nan=False)


def append_line(path: Path, value: Any) -> None:
    """Add a value as a line of JSON to a file, which is made with its folder. An OSError is left to the caller."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        # A process that was killed may have left half a line, so that each value begins a new one.
        file.write(f"\n{json.dumps(value)}\n")


def whole_lines(path: Path) -> Iterator[Any]:
    """The values in a file of such lines, which need not exist; what was only written in part is passed over."""
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        with suppress(ValueError):
            yield json.loads(line)


class Record:
    """A dataclass that is saved as a JSON document."""

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values."""
        return asdict(cast("Any", self))

    def save(self, path: str | Path) -> None:
        """Write JSON; a number that is not finite, which JSON does not have, is null."""
        replace_json(path, versioned(self.to_dict()))
