"""Registers classes and functions by name, for third parties too: by decorator or by entry point."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from difflib import get_close_matches
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from .errors import StructPruneError, one_line


T = TypeVar("T")
Entry = TypeVar("Entry")

MAX_LISTED_NAMES = 40  # more names hide the message: `prune` has more flags


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """End an error message about an unknown name: `" Did you mean 'wanda'? Known: flap, wanda."`."""
    legal = sorted(names)
    close = get_close_matches(name, legal, n=1, cutoff=0.5)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    listed = ", ".join(f"{one_line(name):.60}" for name in legal)  # a table without a head has texts for names
    known = f"{len(legal):,} names" if len(legal) > MAX_LISTED_NAMES else listed or "none"
    return f"{hint} Known: {known}."


class Registry(Generic[T]):
    """Holds classes or functions of one `kind`, such as "criterion", by name.

    A decorator registers them. Third parties may also declare an entry point in its `group`, which is imported when
    its name is asked for. The names in `built_in` are legal before the modules that register them are imported.
    """

    def __init__(self, kind: str, group: str, built_in: Iterable[str] = ()):
        self.kind = kind
        self.group = group
        self.built_in = tuple(built_in)
        self._entries: dict[str, Any] = {}

    def register(self, name: str) -> Callable[[Entry], Entry]:
        """Give a decorator that enters a class or a function under `name`.

        Raises:
            StructPruneError: If `name` is no text, or already stands for another one.
        """
        if not (isinstance(name, str) and name):
            raise StructPruneError(f"A {self.kind} takes a name, got {name!r}; choose one such as 'mine'.")

        def enter(entry: Entry) -> Entry:
            registered = self._entries.get(name)
            if registered is not None and registered is not entry:
                taken = f"The {self.kind} {name!r} is already registered by {_path(registered)}"
                raise StructPruneError(f"{taken}; choose another name for {_path(entry)}.")
            self._entries[name] = entry
            return entry

        return enter

    def get(self, name: str) -> T:
        """Give what is registered under `name`; if nothing is, the error proposes the nearest name."""
        if name not in self._entries:
            points = {point.name: point for point in _declared(self.group)}
            if name not in points:
                raise StructPruneError(f"There is no {self.kind} {name!r}.{did_you_mean(name, self.names())}")
            self.register(name)(points[name].load())
        return self._entries[name]

    def names(self) -> list[str]:
        """List all names in order, the built-in ones and those that installed packages declare."""
        return sorted({*self.built_in, *self._entries, *(point.name for point in _declared(self.group))})

    def check(self, name: str) -> None:
        """Refuse a name that nothing is registered under with a ValueError, without importing anything."""
        if name not in self.names():
            raise ValueError(f"has to name a registered {self.kind}, got {name!r}.{did_you_mean(name, self.names())}")


@cache
def _declared(group: str) -> tuple[EntryPoint, ...]:
    """Find the entry points of installed packages, once: the search takes long, and a run asks dozens of times."""
    return tuple(entry_points(group=group))


def _path(entry: Any) -> str:
    return f"{entry.__module__}.{entry.__qualname__}"
