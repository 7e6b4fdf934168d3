"""The base class of the configs, the checks of their fields, and the readers of YAML and JSON files."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Hashable, Mapping
from inspect import getdoc
from pathlib import Path
from reprlib import repr as short_repr
from typing import Any, TypeVar

import yaml

from ..system.codec import FieldError, check_names, check_types, field_types, from_plain, to_plain
from ..system.errors import StructPruneError, one_line
from ..system.written import FORMAT_VERSION, unversioned


Self = TypeVar("Self", bound="Config")

MAX_SEED = 2**32 - 1
# The units of sizes. File managers and the Hub count in powers of 1,000.
UNITS = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
BINARY_UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
# An argument in a docstring: `name: text`, with its continuation lines.
ARGUMENT = re.compile(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", re.MULTILINE)


class Config:
    """Base class of the configs: dataclasses with checked fields that convert to plain values and back.

    Subclasses extend `validate`, which runs after `__init__`.
    """

    def __new__(cls: type[Self], *args: Any, **values: Any) -> Self:
        check_names(cls, values, cls.__name__)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        self.validate()

    def validate(self) -> None:
        """Raise `StructPruneError` if a field has a value of another type or out of its range."""
        check_types(self, type(self).__name__)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values for JSON."""
        return {name: to_plain(getattr(self, name)) for name in field_types(type(self))}

    @classmethod
    def from_dict(cls: type[Self], data: Mapping[str, Any]) -> Self:
        """Return a config from plain values, as `to_dict` returns them.

        Raises:
            StructPruneError: If a field is unknown or missing, or its value is not legal.
        """
        if isinstance(data, Mapping):
            data = unversioned(data)
        return from_plain(cls, data)

    def refuse(self, name: str, reason: str) -> None:
        """Raise `FieldError` for a field."""
        raise FieldError(type(self).__name__, name, reason)

    def check_count(self, *names: str) -> None:
        """Raise if a field holds a whole number below 1."""
        for name in names:
            value = getattr(self, name)
            if isinstance(value, int) and value < 1:
                self.refuse(name, f"must be at least 1, got {value}")

    def check_share(self, *names: str, allow_zero: bool = False, allow_one: bool = False) -> None:
        """Raise if a field holds a number outside of 0 to 1. The bounds are legal if they are allowed."""
        lower = "greater than 0"
        if allow_zero:
            lower = "at least 0"

        upper = "less than 1"
        if allow_one:
            upper = "at most 1"

        for name in names:
            value = getattr(self, name)
            if value is None or 0 < value < 1:
                continue
            is_legal_bound = (allow_zero and value == 0) or (allow_one and value == 1)
            if not is_legal_bound:
                self.refuse(name, f"must be {lower} and {upper}, got {short_repr(value)}")

    def check_seed(self, name: str) -> None:
        """Raise if a field holds a number that is not a seed."""
        value = getattr(self, name)
        if value is not None and not 0 <= value <= MAX_SEED:
            self.refuse(name, f"must be from 0 to {MAX_SEED}, got {short_repr(value)}")

    def check_not_empty(self, *names: str) -> None:
        """Raise if a field holds an empty string or list."""
        for name in names:
            value = getattr(self, name)
            if value is not None and not value:
                self.refuse(name, f"must not be empty, got {value!r}")


def bytes_of(text: str) -> int | None:
    """Return the bytes of a size with a unit, such as `160MB` or `1.5 GiB`, or None if it is no such size."""
    match = re.fullmatch(r"([0-9]+\.?[0-9]*) ?([A-Za-z]+)", text)
    if match is None:
        return None

    number, name = match.groups()
    for unit, num_bytes in (UNITS | BINARY_UNITS).items():
        if unit.lower() == name.lower():
            return int(float(number) * num_bytes)
    return None


def field_help(cls: type) -> dict[str, str]:
    """Return the first sentence of each field in the `Args:` of a config class, which the command line shows."""
    sentences = {}
    for name, text in ARGUMENT.findall(getdoc(cls) or ""):
        sentence = re.split(r"(?<=\.) (?=[A-Z`])", " ".join(text.split()))[0]
        sentences[name] = sentence
    return sentences


def build(cls: type, values: Mapping[str, Any]) -> Any:
    """Return a dataclass of another library from the values of its fields."""
    check_names(cls, values, cls.__name__)

    try:
        return cls(**values)
    except (TypeError, ValueError) as error:
        raise StructPruneError(f"{cls.__name__}: {one_line(error)}") from error


class UniqueKeyLoader(yaml.SafeLoader):
    """The safe loader of YAML. It refuses repeated keys, and it reads `1e-4` as a number, as YAML 1.2 does."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Return a mapping, or raise if a key is repeated."""
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            identity = (key.tag, str(key.value))
            if identity in lines:
                raise ValueError(f"the key {key.value!r} is in line {lines[identity]} and again in line {line}")
            lines[identity] = line

        return super().construct_mapping(node, deep)


UniqueKeyLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\.[0-9]+|[0-9]+\.?[0-9]*)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


def parse_yaml(text: str) -> Any:
    """Return the value of a YAML document.

    Raises:
        ValueError: If the text is not YAML, or a mapping has the same key twice.
    """
    try:
        return yaml.load(text, UniqueKeyLoader)
    except yaml.YAMLError as error:
        raise ValueError(one_line(error)) from error
    except (TypeError, LookupError, AttributeError) as error:  # a tag that does not fit its value
        raise ValueError(f"a value does not match its tag ({one_line(error)})") from error


def read_yaml(path: str | Path) -> Mapping[str, Any]:
    """Return the mapping in a YAML file."""
    return read_mapping(Path(path), parse_yaml)


def read_json(path: str | Path, version: int = FORMAT_VERSION) -> dict[str, Any]:
    """Return the fields in a JSON file without their schema version, or raise if it has another version."""
    values = read_mapping(Path(path), json.loads)
    try:
        return unversioned(values, version)
    except StructPruneError as error:
        raise StructPruneError(f"{path}: {error}") from error


def read_mapping(path: Path, parse: Callable[[str], Any]) -> Mapping[str, Any]:
    """Return the mapping in a file that `parse` reads."""
    try:
        data = parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StructPruneError(f"{path} cannot be read: {one_line(error)}") from error

    if not isinstance(data, Mapping):
        raise StructPruneError(f"{path} must hold a mapping of fields, got {type(data).__name__}.")
    return data
