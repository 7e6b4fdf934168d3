"""Convert dataclasses to plain values and back, and check the types of their fields. Configs and records use it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import MISSING, fields, is_dataclass
from math import isfinite
from reprlib import repr as short_repr
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from .errors import StructPruneError
from .registry import did_you_mean


Item = TypeVar("Item")
Result = TypeVar("Result")


class FieldError(StructPruneError):
    """A value that a field does not accept.

    Args:
        owner: The name of the config class, or of the record.
        field: The name of the field.
        reason: The rest of the sentence, such as "must be at least 1, got 0".
    """

    def __init__(self, owner: str, field: str, reason: str):
        super().__init__(f"{owner}: `{field}` {reason}.")
        self.owner = owner
        self.field = field
        self.reason = reason


def to_plain(value: Any) -> Any:
    """Convert a value to the types of JSON. Sets become sorted lists, and NaN and infinity become null."""
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        if not isfinite(value):
            return None
        return float(value)

    if is_dataclass(value):
        if hasattr(value, "to_dict"):
            return value.to_dict()
        return plain_fields(value)
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}

    if isinstance(value, Set):
        return sorted(map(str, value))
    if isinstance(value, Sequence):
        return [to_plain(item) for item in value]
    return str(value)


def plain_fields(record: Any) -> dict[str, Any]:
    """Return the fields of a dataclass as plain values, without the fields that are None."""
    values = {field.name: getattr(record, field.name) for field in fields(record)}
    return {name: to_plain(value) for name, value in values.items() if value is not None}


def from_plain(kind: type[Result], values: Any, name: str = "", null: float | None = None) -> Result:
    """Return a dataclass from the plain values that `to_plain` returns.

    Args:
        kind: The dataclass.
        values: Its fields.
        name: The name of a record in error messages, such as a file. The default is the name of the class.
        null: The value of a number that is null. JSON has no infinity.

    Raises:
        StructPruneError: If a field is missing, unknown, or of another type.
    """
    owner = name or kind.__name__
    if not isinstance(values, Mapping):
        raise StructPruneError(f"{owner} must be a mapping of fields, got {short_repr(values)}.")

    check_names(kind, values, owner)
    for field in fields(kind):  # type: ignore[arg-type]
        is_required = field.default is MISSING and field.default_factory is MISSING
        if is_required and field.name not in values:
            raise StructPruneError(f"{owner} needs the field `{field.name}`. Add it.")

    types = field_types(kind)
    converted = {}
    for key, value in values.items():
        place = ""
        if name:
            place = f"{name}: {key}"
        converted[key] = _converted(types[key], value, place, null)

    result = kind(**converted)
    check_types(result, owner)
    return result


def _converted(annotation: Any, value: Any, name: str, null: float | None) -> Any:
    """Return a value of an annotation from its plain form. A value of another form is returned as it is."""
    for member in members_of(annotation):
        if is_dataclass(member) and not isinstance(value, (member, NoneType)):  # type: ignore[arg-type]
            return from_plain(member, value, name, null)  # type: ignore[arg-type]
        if member is float and value is None:
            return null

        origin = get_origin(member)
        arguments = get_args(member)
        if origin is list and isinstance(value, list):
            return [_converted(arguments[0], item, name, null) for item in value]
        if origin is dict and isinstance(value, Mapping):
            # JSON turns numeric keys into strings.
            if arguments[0] is int:
                value = by_layer(value, name)
            return {key: _converted(arguments[1], item, f"{name}: {key}", null) for key, item in value.items()}
    return value


def field_types(kind: Any) -> dict[str, Any]:
    """Return the type of each field of a dataclass by its name."""
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in fields(kind)}


def check_names(kind: Any, values: Mapping[str, Any], owner: str) -> None:
    """Raise if a dataclass has no field of a name."""
    names = [field.name for field in fields(kind)]
    for name in values:
        if name not in names:
            raise StructPruneError(f"{owner} has no field {name!r}.{did_you_mean(str(name), names)}")


def check_types(record: Any, owner: str) -> None:
    """Raise `FieldError` if a field of a dataclass has a value of another type than its annotation."""
    for name, annotation in field_types(type(record)).items():
        value = getattr(record, name)
        if not _is_instance(value, annotation):
            raise FieldError(owner, name, f"must be {_type_name(annotation)}, got {short_repr(value)}")


def members_of(annotation: Any) -> list[Any]:
    """Return the types in a union without None. Any other annotation is its only member."""
    if get_origin(annotation) not in (Union, UnionType):
        return [annotation]
    return [member for member in get_args(annotation) if member is not NoneType]


def _is_instance(value: Any, annotation: Any) -> bool:
    """Return whether a value has the type of an annotation. As in PEP 484, an int is a float. A bool is not an int."""
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
        return isinstance(value, (int, float))
    return isinstance(value, annotation)


def _type_name(annotation: Any) -> str:
    """Return an annotation in words, such as "a list of str"."""
    origin = get_origin(annotation)
    arguments = get_args(annotation)

    if origin in (Union, UnionType):
        # A tuple is a list in Python code.
        members = [member for member in members_of(annotation) if get_origin(member) is not tuple]
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
