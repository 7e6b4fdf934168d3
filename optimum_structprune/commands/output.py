"""Print the result of a command to stdout, and everything else to stderr."""

from __future__ import annotations

import logging
import os
import re
import sys
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .. import __version__
from ..system.errors import SeenTextWarning, StructPruneError, one_line
from ..system.stages import logger as stages
from ..system.written import to_json


# Loggers of messages that help no user: that a config has widths for each layer too, that the clock of a disk differs,
# and errors of `datasets` that our own error repeats.
MUTED_LOGGERS = {
    "transformers.integrations.heterogeneity.configuration_utils": logging.ERROR,
    "transformers.trainer_utils": logging.ERROR,
    "datasets.builder": logging.CRITICAL,
    "datasets.load": logging.CRITICAL,
    "datasets.packaged_modules": logging.CRITICAL,
}


@dataclass(frozen=True)
class Result:
    """The result of a command.

    Attributes:
        text: The printed form.
        values: The plain values for JSON.
        next_command: The command to run next; empty where none is suggested.
    """

    text: str
    values: Mapping[str, Any]
    next_command: str = ""

    def __str__(self) -> str:
        """Return the text with the suggested command as its last line."""
        if not self.next_command:
            return self.text
        return f"{self.text}\nNext: {self.next_command}"

    def extended(self, line: str, values: Mapping[str, Any]) -> Result:
        """Return the result with one more line of text and more values."""
        all_values = dict(self.values)
        all_values.update(values)
        return replace(self, text=f"{self.text}\n{line}", values=all_values)


def check_file(file: str, label: str, overwrite: bool = False) -> None:
    """Raise `StructPruneError` if a file has no folder, or exists and must not be replaced.

    Args:
        file: The file.
        label: The flag with its value, for the error.
        overwrite: Whether an existing file is replaced.
    """
    path = Path(file)
    if not path.absolute().parent.is_dir():
        raise StructPruneError(f"{label} cannot be written: there is no folder {path.parent}.")
    if path.is_file() and path.stat().st_size and not overwrite:
        raise StructPruneError(f"{label} exists. Choose another file, or replace it with --overwrite.")


def visible(text: str) -> str:
    """Return a text with control characters escaped, because a terminal would obey them."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda code: repr(code[0])[1:-1], text)


def show(result: Result, args: Namespace) -> None:
    """Print a result, as text or as JSON, and write the file of `--json` if one is named."""
    values: dict[str, Any] = {"structprune": __version__}
    values.update(result.values)
    document = to_json(values)

    if isinstance(args.json, str):
        Path(args.json).write_text(document + "\n", encoding="utf-8")

    try:
        encoding = sys.stdout.encoding or "utf-8"
        text = document if args.json is True else visible(str(result))
        sys.stdout.write(text.encode(encoding, "replace").decode(encoding) + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader has closed the pipe, as `head` does. Python would raise again when it flushes the pipe at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def note(args: Namespace, text: str) -> None:
    """Write a note on the progress to the standard error, unless `--quiet` is set."""
    if not args.quiet:
        sys.stderr.write(f"{visible(text)}\n")


@contextmanager
def working(args: Namespace, silent: bool = False) -> Iterator[None]:
    """Reserve the standard output for the result inside `with`.

    Output of libraries is redirected to the standard error, or dropped with `--quiet`. Progress bars appear only on a
    terminal; elsewhere each stage prints a line when it begins.

    Args:
        args: The arguments of the command.
        silent: Whether to act as with `--quiet`.
    """
    args.quiet = args.quiet or silent
    if "torch" not in sys.modules:
        note(args, "Loading libraries …")
    with ExitStack() as stack:
        stream = sys.stderr
        if args.quiet:
            stream = stack.enter_context(open(os.devnull, "w"))
        stack.enter_context(redirect_stdout(stream))

        _set_levels(MUTED_LOGGERS, stack)
        if args.quiet or not sys.stderr.isatty():
            _hide_bars(args.command.reads_text, stack)
            if not args.quiet:
                _print_stages(stack)

        stack.enter_context(warnings.catch_warnings())
        # Libraries address future warnings to programmers, and the result of an evaluation repeats the others.
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", category=SeenTextWarning)
        warnings.showwarning = _show_warning
        yield


def _set_levels(levels: Mapping[str, int], stack: ExitStack) -> None:
    """Set the levels of loggers until a stack ends."""
    for name, level in levels.items():
        logger = logging.getLogger(name)
        stack.callback(logger.setLevel, logger.level)
        logger.setLevel(level)


def _print_stages(stack: ExitStack) -> None:
    """Print a line to the standard error when a stage begins, until a stack ends."""
    _set_levels({stages.name: logging.INFO}, stack)
    handler = logging.StreamHandler(sys.stderr)
    stages.addHandler(handler)
    stack.callback(stages.removeHandler, handler)


def _show_warning(message: Warning | str, *place: Any, **options: Any) -> None:
    """Write a warning as one line, without its place in the code."""
    sys.stderr.write(f"warning: {visible(one_line(message))}\n")


def _hide_bars(reads_text: bool, stack: ExitStack) -> None:
    """Turn off the progress bars of libraries until a stack ends."""
    import huggingface_hub.utils as hub
    from transformers.utils import logging as models

    # Whether a library shows bars, and the functions that turn them on and off. The stack restores the last library
    # first, because the functions of transformers also change huggingface_hub.
    switches: list[tuple[bool, Callable[..., Any], Callable[..., Any]]] = [
        (not hub.are_progress_bars_disabled(), hub.enable_progress_bars, hub.disable_progress_bars),
        (models.is_progress_bar_enabled(), models.enable_progress_bar, models.disable_progress_bar),
    ]
    if reads_text or "datasets" in sys.modules:
        import datasets.utils as data

        switches.append((data.is_progress_bar_enabled(), data.enable_progress_bars, data.disable_progress_bars))

    for is_enabled, enable, disable in switches:
        if is_enabled:
            stack.callback(enable)
            disable()
