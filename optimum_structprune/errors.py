"""Says what went wrong in words that a user can act on."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Collection
from traceback import walk_stack


MAX_NAMES = 3  # in a message


class StructPruneError(ValueError):
    """A mistake in the input, with the nearest legal choice; only an `InPlaceError` leaves changes."""


class InPlaceError(StructPruneError, RuntimeError):
    """Pruning stopped after a model that was to be changed in place had begun to change: load the model again."""


class SeenTextWarning(UserWarning):
    """The text of an evaluation was used to prune or to train the model, so its figures may be too good."""


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the line outside of this package that has led here, whatever lies between."""
    package = __name__.partition(".")[0]
    modules = [frame.f_globals.get("__name__", "") for frame, _ in walk_stack(sys._getframe())]
    outside = 1 + max(level for level, module in enumerate(modules) if module.partition(".")[0] == package)
    # Context managers that decorate a function lie between it and who calls it.
    while outside < len(modules) and modules[outside] in ("contextlib", "torch.utils._contextlib"):
        outside += 1
    warnings.warn(message, category, stacklevel=outside + 1)


def one_line(message: object) -> str:
    """Put a message, such as the error of another library, into one line."""
    return " ".join(str(message).split())


def some_of(names: Collection[str]) -> str:
    """List the first names and how many more there are: `"a, b, c and 4 more"`."""
    more = len(names) - MAX_NAMES
    return ", ".join([*names][:MAX_NAMES]) + (f" and {more} more" if more > 0 else "")
