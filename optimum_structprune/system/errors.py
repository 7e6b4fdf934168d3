"""Define the errors and warnings of this package, and format their messages."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Collection
from traceback import walk_stack


MAX_NAMES = 3  # in a message
MAX_REASON = 300  # characters of the error of another library


class StructPruneError(ValueError):
    """An error in the input. Nothing has been changed, unless the error is an `InPlaceError`."""


class InPlaceError(StructPruneError, RuntimeError):
    """An error after a model has begun to change in place. Load the model again."""


class SeenTextWarning(UserWarning):
    """The text of an evaluation was used to prune or to train the model, so its figures may be too good."""


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Issue a warning at the line of the caller outside of this package."""
    package = __name__.partition(".")[0]
    modules = [frame.f_globals.get("__name__", "") for frame, _ in walk_stack(sys._getframe())]

    last_inside = 0
    for level, module in enumerate(modules):
        if module.partition(".")[0] == package:
            last_inside = level

    outside = last_inside + 1
    # The frame of a context manager that decorates a function is between the function and its caller.
    while outside < len(modules) and modules[outside] in ("contextlib", "torch.utils._contextlib"):
        outside += 1
    warnings.warn(message, category, stacklevel=outside + 1)


def one_line(message: object) -> str:
    """Return a message, such as the error of another library, in one line."""
    return " ".join(str(message).split())


def reason_of(error: BaseException) -> str:
    """Return the first sentences of another library's error in one line, or its class if it has no message."""
    line = one_line(error)
    if "weights_only" in line:
        # PyTorch advises to load the objects, which runs their code.
        return "a file holds Python objects besides tensors, which could run code. Pass a safetensors file"
    if "trust_remote_code" in line:
        return "it runs code of its own. Read the code, and set trust_remote_code=True"
    if len(line) > MAX_REASON:
        line = line[:MAX_REASON]
        end = max(line.rfind(". "), line.rfind("; "))
        if end < 0:
            return f"{line.rpartition(' ')[0]} …"
        line = line[:end]
    return line.rstrip(".") or type(error).__name__


def capitalized(text: str) -> str:
    """Return a text with a capital first letter, to begin a sentence. `str.capitalize` lowers all other letters."""
    return f"{text[:1].upper()}{text[1:]}"


def some_of(names: Collection[str]) -> str:
    """Return the first names and the number of further names, such as `"a, b, c and 4 more"`."""
    text = ", ".join(list(names)[:MAX_NAMES])
    num_hidden = len(names) - MAX_NAMES
    if num_hidden > 0:
        text += f" and {num_hidden} more"
    return text
