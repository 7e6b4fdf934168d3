"""Convert the dataclasses of this package to plain JSON values and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from math import inf
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from ..errors import StructPruneError


Result = TypeVar("Result")


def encode(value: Any) -> Any:
    """Return a value as dictionaries, lists, strings and numbers, without the fields that are None."""
    if is_dataclass(value) and not isinstance(value, type):
        items = {field.name: getattr(value, field.name) for field in fields(value)}
        return {name: encode(item) for name, item in items.items() if item is not None}

    if isinstance(value, Mapping):
        return {key: encode(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [encode(item) for item in value]
    return value


def decode(kind: type[Result], value: Any, name: str) -> Result:
    """Return a dataclass from the plain values that `encode` wrote.

    A number that is null is read as infinity, because JSON has no infinity.

    Args:
        kind: The dataclass.
        value: Its plain form.
        name: The name of the value in error messages, such as a file name.

    Raises:
        StructPruneError: If a field is missing, unknown, or of another type.
    """
    if not isinstance(value, Mapping):
        raise StructPruneError(f"{name} must be an object, got {type(value).__name__}.")

    types = field_types(kind)  # type: ignore[arg-type]
    unknown = sorted(set(value) - set(types))
    if unknown:
        raise StructPruneError(f"{name} has the unknown field {unknown[0]!r}.")

    for field in fields(kind):  # type: ignore[arg-type]
        has_default = field.default is not MISSING or field.default_factory is not MISSING
        if field.name not in value and not has_default:
            raise StructPruneError(f"{name} lacks the field {field.name!r}.")

    decoded = {field: _decode(types[field], item, f"{name}: {field}") for field, item in value.items()}
    return kind(**decoded)


@cache
def field_types(kind: type) -> dict[str, Any]:
    """Return the type of each field of a dataclass."""
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in fields(kind)}


def _decode(kind: Any, value: Any, name: str) -> Any:
    """Return a value of a type from its plain form."""
    if kind is Any:
        return value

    if is_optional(kind):
        inner = inner_type(kind)
        if value is None and inner is not float:
            return None
        return _decode(inner, value, name)

    if is_dataclass(kind):
        return decode(kind, value, name)  # type: ignore[arg-type]

    origin = get_origin(kind)
    if origin is dict:
        return _decode_dict(kind, value, name)
    if origin is list:
        return _decode_list(kind, value, name)
    if kind is float:
        return _decode_number(value, name)

    if type(value) is not kind:
        raise StructPruneError(f"{name} must be of type {kind.__name__}, got {value!r}.")
    return value


def _decode_list(kind: Any, value: Any, name: str) -> list[Any]:
    """Return a list from its plain form."""
    if not isinstance(value, list):
        raise StructPruneError(f"{name} must be a list, got {type(value).__name__}.")

    (item_type,) = get_args(kind)
    return [_decode(item_type, item, name) for item in value]


def _decode_dict(kind: Any, value: Any, name: str) -> dict[Any, Any]:
    """Return a dictionary from its plain form, in which JSON has written numeric keys as strings."""
    if not isinstance(value, Mapping):
        raise StructPruneError(f"{name} must be an object, got {type(value).__name__}.")

    key_type, item_type = get_args(kind)
    try:
        return {key_type(key): _decode(item_type, item, f"{name}: {key}") for key, item in value.items()}
    except ValueError as error:
        raise StructPruneError(f"{name}: {error}") from error


def _decode_number(value: Any, name: str) -> float:
    """Return a number from its plain form; null stands for infinity."""
    if value is None:
        return inf
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise StructPruneError(f"{name} must be a number, got {value!r}.")
    return float(value)


def is_optional(kind: Any) -> bool:
    """Return whether a type is a union of one type and None."""
    return get_origin(kind) in (Union, UnionType) and type(None) in get_args(kind) and len(get_args(kind)) == 2


def inner_type(kind: Any) -> Any:
    """Return the type of an optional value that is not None."""
    return next(part for part in get_args(kind) if part is not type(None))
