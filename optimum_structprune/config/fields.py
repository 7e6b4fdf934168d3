"""The base class of the configs, the checks of their fields, and the readers of YAML and JSON files."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Hashable, Mapping
from dataclasses import MISSING, fields
from inspect import getdoc
from pathlib import Path
from reprlib import repr as short_repr
from types import NoneType, UnionType
from typing import Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from ..errors import StructPruneError, one_line
from ..registry import did_you_mean
from ..written import unversioned


Item = TypeVar("Item")
Self = TypeVar("Self", bound="Config")

MAX_COUNT = 10**12  # of samples, tokens or units; products of larger numbers do not fit into 64 bits
MAX_SEED = 2**32 - 1
# An argument in a docstring: `name: text`, with its continuation lines.
ARGUMENT = re.compile(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", re.MULTILINE)


class FieldError(StructPruneError):
    """A value that a field does not accept.

    Args:
        owner: The name of the config class.
        field: The name of the field.
        reason: The rest of the sentence, such as "must be at least 1, got 0".
    """

    def __init__(self, owner: str, field: str, reason: str):
        super().__init__(f"{owner}: `{field}` {reason}.")
        self.owner = owner
        self.field = field
        self.reason = reason


class Config:
    """Base class of the configs: dataclasses with checked fields that convert to plain values and back.

    Subclasses extend `validate`, which runs after `__init__`.

    Attributes:
        nested: Functions by the names of the fields that hold other configs. Each converts plain values to configs.
    """

    nested: ClassVar[Mapping[str, Callable[[Any], Any]]] = {}

    def __new__(cls: type[Self], *args: Any, **values: Any) -> Self:
        check_names(cls, values)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        self.validate()

    def validate(self) -> None:
        """Raise `StructPruneError` if a field has a value of another type or out of its range."""
        check_types(self)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values for JSON."""
        return {name: _plain(getattr(self, name)) for name in field_names(type(self))}

    @classmethod
    def from_dict(cls: type[Self], data: Mapping[str, Any]) -> Self:
        """Return a config from plain values, as `to_dict` returns them.

        Raises:
            StructPruneError: If a field is unknown or missing, or its value is not legal.
        """
        if not isinstance(data, Mapping):
            raise StructPruneError(f"{cls.__name__} must be a mapping of fields, got {short_repr(data)}.")

        values = {str(name): value for name, value in unversioned(data).items()}
        check_names(cls, values)
        for field in fields(cls):  # type: ignore[arg-type]  # every subclass is a dataclass
            is_required = field.default is MISSING and field.default_factory is MISSING
            if is_required and field.name not in values:
                raise StructPruneError(f"{cls.__name__} needs the field `{field.name}`. Add it.")

        for name, convert in cls.nested.items():
            if isinstance(values.get(name), (list, Mapping)):
                values[name] = convert(values[name])
        return cls(**values)

    def refuse(self, name: str, reason: str) -> None:
        """Raise `FieldError` for a field."""
        raise FieldError(type(self).__name__, name, reason)

    def check_count(self, *names: str) -> None:
        """Raise if a field holds a whole number outside of 1 to `MAX_COUNT`."""
        for name in names:
            value = getattr(self, name)
            if not isinstance(value, int):
                continue

            if value < 1:
                self.refuse(name, f"must be at least 1, got {value}")
            if value > MAX_COUNT:
                self.refuse(name, f"must be at most {MAX_COUNT:,}, got {short_repr(value)}")

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


def _plain(value: Any) -> Any:
    """Convert a value of a field to plain values for JSON."""
    if isinstance(value, Config):
        return value.to_dict()
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def field_names(cls: Any) -> list[str]:
    """Return the names of the fields of a dataclass."""
    return [field.name for field in fields(cls)]


def field_help(cls: type) -> dict[str, str]:
    """Return the first sentence of each field in the `Args:` of a config class, which the command line shows."""
    sentences = {}
    for name, text in ARGUMENT.findall(getdoc(cls) or ""):
        sentence = re.split(r"(?<=\.) (?=[A-Z`])", " ".join(text.split()))[0]
        sentences[name] = sentence
    return sentences


def check_names(cls: Any, values: Mapping[str, Any]) -> None:
    """Raise if a dataclass has no field of a name."""
    names = field_names(cls)
    for name in values:
        if name not in names:
            raise StructPruneError(f"{cls.__name__} has no field {name!r}.{did_you_mean(name, names)}")


def check_types(config: Any) -> None:
    """Raise `FieldError` if a field of a dataclass has a value of another type than its annotation."""
    owner = type(config).__name__
    hints = get_type_hints(type(config))

    for name in field_names(type(config)):
        value = getattr(config, name)

        if not _is_instance(value, hints[name]):
            raise FieldError(owner, name, f"must be {_type_name(hints[name])}, got {short_repr(value)}")
        if isinstance(value, str) and re.search("[\ud800-\udfff]", value):
            # Such a text comes from a file name that is not UTF-8, and no JSON file could hold it.
            raise FieldError(owner, name, f"must be text in UTF-8, got {value!r}. Rename the file")


def _is_instance(value: Any, annotation: Any) -> bool:
    """Return whether a value has the type of an annotation.

    As in PEP 484, an int is a float. A bool is not an int, and a float must be finite.
    """
    if annotation is Any:
        return True

    origin = get_origin(annotation)
    arguments = get_args(annotation)

    if origin in (Union, UnionType):
        return any(_is_instance(value, member) for member in arguments)
    if origin is Literal:
        return isinstance(value, str) and value in arguments
    if origin in (list, tuple):
        return isinstance(value, origin) and all(_is_instance(item, arguments[0]) for item in value)
    if origin is dict:
        has_keys = isinstance(value, dict) and all(_is_instance(key, arguments[0]) for key in value)
        return has_keys and all(_is_instance(item, arguments[1]) for item in value.values())

    if annotation in (int, float) and isinstance(value, bool):
        return False
    if annotation is float:
        is_large = isinstance(value, int) and value.bit_length() > 1000
        return isinstance(value, (int, float)) and not is_large and math.isfinite(value)
    return isinstance(value, annotation)


def _type_name(annotation: Any) -> str:
    """Return an annotation in words, such as "a list of str"."""
    origin = get_origin(annotation)
    arguments = get_args(annotation)

    if origin in (Union, UnionType):
        # Tuples and None are left out: a tuple is a list in Python code, and None is an unset field.
        members = [member for member in arguments if member is not NoneType and get_origin(member) is not tuple]
        return " or ".join(map(_type_name, members))

    if origin is Literal:
        return " or ".join(map(repr, arguments))
    if origin in (list, tuple):
        return f"a list of {_type_name(arguments[0])}"
    if origin is dict:
        return f"a mapping to {_type_name(arguments[1])}"

    words = {int: "a whole number", float: "a number", str: "a string"}
    return words.get(annotation) or annotation.__name__


def by_layer(values: Mapping[Any, Item], name: str) -> dict[int, Item]:
    """Return a mapping with layer indices as its keys. JSON turns such keys into strings.

    Raises:
        StructPruneError: If a key is not an index, or two keys are the same index.
    """
    items: dict[int, Item] = {}
    for key, value in values.items():
        is_index = re.fullmatch("-?[0-9]{1,9}", str(key)) is not None
        if not is_index or int(key) in items:
            keys = short_repr(list(values))
            raise StructPruneError(f"{name} must have layer indices as keys, each once, got {keys}.")

        items[int(key)] = value
    return items


def build(cls: type, values: Mapping[str, Any]) -> Any:
    """Return a dataclass of another library from the values of its fields."""
    check_names(cls, values)

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
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except yaml.YAMLError as error:
        raise ValueError(one_line(error)) from error
    except (TypeError, LookupError, AttributeError) as error:  # a tag that does not fit its value
        raise ValueError(f"a value does not match its tag ({one_line(error)})") from error


def read_yaml(path: str | Path) -> Mapping[str, Any]:
    """Return the mapping in a YAML file."""
    return read_mapping(Path(path), parse_yaml)


def read_json(path: str | Path) -> Mapping[str, Any]:
    """Return the fields in a JSON file without their schema version, or raise if this version is unknown."""
    values = read_mapping(Path(path), json.loads)
    try:
        return unversioned(values)
    except StructPruneError as error:
        raise StructPruneError(f"{path}: {error}") from error


def read_mapping(path: Path, parse: Callable[[str], Any]) -> Mapping[str, Any]:
    """Return the mapping in a file that `parse` reads."""
    try:
        data = parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise StructPruneError(f"{path} cannot be read: {one_line(error)}") from error

    if not isinstance(data, Mapping):
        raise StructPruneError(f"{path} must hold a mapping of fields, got {type(data).__name__}.")
    return data
