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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import __version__
from ..errors import SeenTextWarning, StructPruneError, one_line
from ..system.stages import logger as stages
from ..written import to_json


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
        return f"{self.text}\nNext: {self.next_command}" if self.next_command else self.text


def check_file(file: str, label: str, overwrite: bool = False) -> None:
    """Raise if a file has no folder, or exists and must not be replaced."""
    path = Path(file)
    if not path.absolute().parent.is_dir():
        raise StructPruneError(f"{label} cannot be written: there is no folder {path.parent}.")
    if path.is_file() and path.stat().st_size and not overwrite:
        raise StructPruneError(f"{label} exists; name another file, or replace it with --overwrite.")


def visible(text: str) -> str:
    """Return a text with control characters escaped, because a terminal would obey them."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda code: repr(code[0])[1:-1], text)


def show(result: Result, args: Namespace) -> None:
    """Print a result, as text or as JSON, and write the file of `--json` if one is named."""
    document = to_json({"structprune": __version__, **result.values})
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
    """Write a note on the progress to the standard error, unless `--quiet` is given."""
    if not args.quiet:
        sys.stderr.write(f"{visible(text)}\n")


@contextmanager
def working(args: Namespace, silent: bool = False) -> Iterator[None]:
    """Keep the standard output free for the result: what libraries print goes to the standard error, or nowhere with
    `--quiet`. Bars appear only on a terminal; elsewhere each stage prints a line when it begins.
    """
    args.quiet = args.quiet or silent
    with ExitStack() as stack:
        prints = stack.enter_context(open(os.devnull, "w")) if args.quiet else sys.stderr
        stack.enter_context(redirect_stdout(prints))
        levels = dict(MUTED_LOGGERS)
        if args.quiet or not sys.stderr.isatty():
            _hide_bars(args.command.reads_text, stack)
            # The bar of transformers' Trainer has no switch; it is left out where this logger shows errors only.
            levels["transformers.training_args"] = logging.ERROR
            if not args.quiet:
                levels[stages.name] = logging.INFO
                lines = logging.StreamHandler(sys.stderr)
                stages.addHandler(lines)
                stack.callback(stages.removeHandler, lines)
        for name, level in levels.items():
            logger = logging.getLogger(name)
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(level)
        stack.enter_context(warnings.catch_warnings())
        # Libraries address these to programmers; the result of an evaluation repeats the others.
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", category=SeenTextWarning)
        warnings.showwarning = _show_warning
        yield


def _show_warning(message: Warning | str, *place: Any, **options: Any) -> None:
    """Write a warning as one line, without the file and the line of code that it comes from."""
    sys.stderr.write(f"warning: {visible(one_line(message))}\n")


def _hide_bars(reads_text: bool, stack: ExitStack) -> None:
    """Switch the bars of libraries off until a stack ends."""
    import huggingface_hub.utils as hub
    from transformers.utils import logging as models

    # Each with whether it shows bars. They are restored in turn from the end, since the switch of transformers moves
    # that of huggingface_hub too.
    switches: list[tuple[bool, Callable[..., Any], Callable[..., Any]]] = [
        (not hub.are_progress_bars_disabled(), hub.enable_progress_bars, hub.disable_progress_bars),
        (models.is_progress_bar_enabled(), models.enable_progress_bar, models.disable_progress_bar),
    ]
    if reads_text or "datasets" in sys.modules:
        import datasets.utils as data

        switches.append((data.is_progress_bar_enabled(), data.enable_progress_bars, data.disable_progress_bars))
    for shows, enable, disable in switches:
        if shows:
            stack.callback(enable)
            disable()
