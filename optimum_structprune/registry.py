"""Tables of classes by name, open to third parties by decorator and by entry point."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from difflib import get_close_matches
from importlib.metadata import entry_points
from typing import Generic, TypeVar

from .errors import StructPruneError


T = TypeVar("T")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of an error message: `" Did you mean 'wanda'? Known: flap, wanda."`.

    Args:
        name: The name that is not known.
        known: The names that are known; where none of them is close, only they are listed.
    """
    known = sorted(known)
    close = get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"{hint} Known: {', '.join(known) or 'none'}."


class Registry(Generic[T]):
    """A table of classes of one kind.

    Built-in classes register with the decorator. Third parties do the same, or declare an entry point in the group
    `optimum_structprune.<kind>s`, which is imported only when its name is asked for.

    Args:
        kind: What the classes are, in the singular ("criterion"), for messages.
        group: The name of the entry-point group.
    """

    def __init__(self, kind: str, group: str):
        self.kind = kind
        self.group = group
        self._classes: dict[str, type[T]] = {}

    def register(self, name: str) -> Callable[[type[T]], type[T]]:
        """Give a class decorator that enters a class under `name`.

        Raises:
            StructPruneError: If `name` already stands for another class.
        """

        def enter(cls: type[T]) -> type[T]:
            registered = self._classes.get(name)
            if registered is not None and registered is not cls:
                raise StructPruneError(
                    f"The {self.kind} {name!r} is already registered by "
                    f"{registered.__module__}.{registered.__qualname__}; choose another name for "
                    f"{cls.__module__}.{cls.__qualname__}."
                )
            self._classes[name] = cls
            return cls

        return enter

    def get(self, name: str) -> type[T]:
        """The class registered under `name`.

        Raises:
            StructPruneError: If there is none; the message proposes the nearest name.
        """
        if name not in self._classes:
            points = {point.name: point for point in entry_points(group=self.group)}
            if name not in points:
                raise StructPruneError(f"There is no {self.kind} {name!r}.{did_you_mean(name, self.names())}")
            self.register(name)(points[name].load())
        return self._classes[name]

    def names(self) -> list[str]:
        """All names in order, those of built-in classes and those that installed packages declare."""
        return sorted({*self._classes, *(point.name for point in entry_points(group=self.group))})
