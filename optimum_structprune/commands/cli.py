"""The command line, which `structprune` and `optimum-cli structprune` share."""

from __future__ import annotations

import os
import sys
import traceback
from argparse import ArgumentParser, HelpFormatter, Namespace
from collections.abc import Callable, Sequence
from contextlib import suppress
from signal import SIGTERM, default_int_handler, signal
from typing import Any

from .. import __version__
from ..system.errors import StructPruneError, one_line
from ..system.processes import launched
from ..system.registry import did_you_mean
from .arguments import by_flag
from .flags import COMMANDS
from .output import Result, show, visible, working


DESCRIPTION = "Structured pruning of Hugging Face models."
# If this environment variable is 1, errors show their tracebacks.
DEBUG_VARIABLE = "STRUCTPRUNE_DEBUG"
# Parts of the errors of libraries that the system refuses memory to. The second one is an import that fails.
NO_MEMORY = ("allocate memory", "failed to map segment")


class CommandFormatter(HelpFormatter):
    """The formatter of the help of a command. It keeps the lines of the examples."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if "\n" in text:
            return text
        return super()._fill_text(text, width, indent)


class CommandParser(ArgumentParser):
    """The parser of one command. It declares its arguments at the first use, because importing the configs is slow."""

    declare: Callable[[ArgumentParser], None] | None = None

    def parse_known_args(self, *args: Any, **kwargs: Any) -> Any:
        """See `ArgumentParser.parse_known_args`. For an unknown flag, the error suggests the nearest one."""
        if self.declare is not None:
            declare = self.declare
            self.declare = None
            declare(self)

        namespace, unknown_words = super().parse_known_args(*args, **kwargs)
        for word in unknown_words:
            if word.startswith("--"):
                flag = word.partition("=")[0]
                self.error(f"there is no flag {flag}.{did_you_mean(flag, self._option_string_actions)}")
        return namespace, unknown_words

    def format_usage(self) -> str:
        """Return only the positional arguments, because the list of flags is too long for a usage error."""
        formatter = self._get_formatter()
        formatter.add_usage(None, self._get_positional_actions(), [])
        return f"{formatter.format_help().rstrip()} [flags]\n"


def add_commands(parser: ArgumentParser) -> None:
    """Add a subparser for each command. `execute` runs the command of the parsed arguments."""

    def print_help(args: Namespace) -> int:
        parser.print_help()
        return 2

    parser.set_defaults(run=print_help)
    subparsers = parser.add_subparsers(title="commands", metavar="<command>", parser_class=CommandParser)

    for command in COMMANDS:
        subparser = subparsers.add_parser(
            command.name,
            help=command.help,
            description=command.help,
            epilog="\n  ".join(["examples:", *command.examples]),
            formatter_class=CommandFormatter,
            allow_abbrev=False,
        )
        subparser.declare = command.declare
        subparser.set_defaults(run=command.run)


def execute(args: Namespace) -> int:
    """Run a command, print its result or its error, and return its exit code."""
    if "command" not in args:
        return args.run(args)

    rank = 0
    try:
        rank = launched("RANK", 0)
        from .checks import check_flags  # imported here, because importing the configs is slow

        check_flags(args)
        with working(args, silent=rank > 0):
            result: Result = args.run(args)
        if rank == 0:
            show(result, args)
        return 0
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if os.environ.get(DEBUG_VARIABLE, "0") not in ("", "0"):
            traceback.print_exc()
        code, text = explained(error, args)
        start = "structprune: error"
        if rank > 0:
            start += f" in process {rank}"
        sys.stderr.write(f"{start}: {visible(one_line(text))}\n")
        return code


def explained(error: Exception, args: Namespace) -> tuple[int, str]:
    """Return the exit code and the text of an error: 2 for bad input or a failing machine, 1 for a bug."""
    if isinstance(error, StructPruneError):
        return 2, by_flag(error, args)

    kind = type(error).__name__
    text = str(error)
    if isinstance(error, MemoryError) or "OutOfMemory" in kind or any(reason in text for reason in NO_MEMORY):
        return 2, f"There is not enough memory: {text or kind}"
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return 2, f"{error.filename}: {error.strerror}."

    text = ": ".join(filter(None, [kind, text]))
    cause = error.__cause__
    if isinstance(cause, Exception) and str(cause) not in text:
        text += f" (because of {type(cause).__name__}: {cause})"
    if isinstance(error, OSError):
        return 2, text
    return 1, f"{text}. This is unexpected: please report it with what {DEBUG_VARIABLE}=1 in the environment shows."


def main(argv: Sequence[str] | None = None) -> int:
    """Run the console script `structprune` and return its exit code."""
    # SIGTERM acts like Ctrl-C, so that no lock and no working folder remains. Only the main thread can set a handler.
    with suppress(ValueError):
        signal(SIGTERM, default_int_handler)

    # A stream that the shell has closed is None.
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")

    parser = ArgumentParser("structprune", description=DESCRIPTION)
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    add_commands(parser)
    try:
        return execute(parser.parse_args(argv))
    except KeyboardInterrupt:  # during the imports for the parser, which take seconds
        return 130
