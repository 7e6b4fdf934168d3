"""Register classes and functions by name. Third parties extend registries by decorators or entry points."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from difflib import get_close_matches
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from .errors import StructPruneError, one_line


T = TypeVar("T")
Entry = TypeVar("Entry")

MAX_LISTED_NAMES = 40  # a longer list would hide the message
MAX_NAME_LENGTH = 60  # a CSV file without a header has texts as the names of its columns


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Return the end of an error message about an unknown name: `" Did you mean 'wanda'? Known: flap, wanda."`."""
    legal = sorted(names)

    hint = ""
    matches = get_close_matches(name, legal, n=1, cutoff=0.5)
    if matches:
        hint = f" Did you mean {matches[0]!r}?"

    if not legal:
        listing = "none"
    elif len(legal) > MAX_LISTED_NAMES:
        listing = f"{len(legal):,} names"
    else:
        listing = ", ".join(one_line(name)[:MAX_NAME_LENGTH] for name in legal)
    return f"{hint} Known: {listing}."


class Registry(Generic[T]):
    """Classes or functions of one kind, by name.

    They are registered by a decorator, or declared as entry points, which are imported when they are used.

    Args:
        kind: The kind in error messages, such as "criterion".
        group: The group of the entry points.
        built_in: Names that are legal before the modules that register them are imported.
    """

    def __init__(self, kind: str, group: str, built_in: Iterable[str] = ()):
        self.kind = kind
        self.group = group
        self.built_in = tuple(built_in)
        self._entries: dict[str, Any] = {}

    def register(self, name: str) -> Callable[[Entry], Entry]:
        """Return a decorator that registers a class or a function under `name`.

        Raises:
            StructPruneError: If `name` is not a string, or another entry has this name.
        """
        if not isinstance(name, str) or not name:
            raise StructPruneError(f"The name of a {self.kind} must be a string, got {name!r}. Choose one.")

        def enter(entry: Entry) -> Entry:
            registered = self._entries.get(name)
            if registered is not None and registered is not entry:
                raise StructPruneError(
                    f"The {self.kind} {name!r} is already registered by {_path(registered)}. Choose another name for "
                    f"{_path(entry)}."
                )

            self._entries[name] = entry
            return entry

        return enter

    def get(self, name: str) -> T:
        """Return the entry of a name.

        Raises:
            StructPruneError: If no entry has the name. The message suggests the nearest name.
        """
        if name not in self._entries:
            points = {point.name: point for point in _declared(self.group)}
            if name not in points:
                raise StructPruneError(f"There is no {self.kind} {name!r}.{did_you_mean(name, self.names())}")

            self.register(name)(points[name].load())
        return self._entries[name]

    def names(self) -> list[str]:
        """Return the sorted names of the built-in, registered and declared entries."""
        names = set(self.built_in)
        names.update(self._entries)
        names.update(point.name for point in _declared(self.group))
        return sorted(names)


@cache
def _declared(group: str) -> tuple[EntryPoint, ...]:
    """Return the entry points of installed packages. The search is slow, so it runs once for a group."""
    return tuple(entry_points(group=group))


def _path(entry: Any) -> str:
    return f"{entry.__module__}.{entry.__qualname__}"
