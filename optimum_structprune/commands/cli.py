"""The commands of `structprune`, which `optimum-cli structprune` shares."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

from .. import __version__
from ..errors import InPlaceError, StructPruneError


DESCRIPTION = "Structured pruning of Hugging Face models."
# Each is a module here with NAME, HELP, add_arguments(parser) and run(args) -> int. `optimum-cli` imports them all
# on every call, so what is heavy is imported inside add_arguments() and run().
COMMANDS = ("prune", "calibrate", "plan", "recover", "evaluate", "inspect", "export", "apply")


class CommandParser(ArgumentParser):
    """A parser of one command, whose arguments are declared when it is first used.

    They are read from the configs, and these take longer to import than a call of `optimum-cli` that needs none of
    them should wait.
    """

    declare: Callable[[ArgumentParser], None] | None = None

    def parse_known_args(self, *args: Any, **kwargs: Any) -> Any:
        """See `ArgumentParser.parse_known_args`."""
        self._declare()
        return super().parse_known_args(*args, **kwargs)

    def format_help(self) -> str:
        """See `ArgumentParser.format_help`."""
        self._declare()
        return super().format_help()

    def _declare(self) -> None:
        declare, self.declare = self.declare, None
        if declare is not None:
            declare(self)


def add_commands(parser: ArgumentParser) -> None:
    """Add one subparser per command; `execute` runs the one that the arguments choose."""

    def help_(args: Namespace) -> int:
        parser.print_help()
        return 2

    parser.set_defaults(run=help_)
    subparsers = parser.add_subparsers(title="commands", metavar="<command>", parser_class=CommandParser)
    for name in COMMANDS:
        command = import_module(f"{__package__}.{name}")
        subparser = subparsers.add_parser(command.NAME, help=command.HELP, description=command.HELP)
        subparser.declare = command.add_arguments
        subparser.set_defaults(run=command.run)


def execute(args: Namespace) -> int:
    """Run the chosen command and return its exit code.

    A user's mistake, also one that is found half-way through a model, is one line without a traceback and exit code 2.
    An interruption is exit code 130.
    """
    try:
        return args.run(args)
    except (StructPruneError, InPlaceError) as error:
        sys.stderr.write(f"structprune: error: {' '.join(str(error).split())}\n")
        return 2
    except KeyboardInterrupt:
        return 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the console script `structprune` and return its exit code."""
    parser = ArgumentParser("structprune", description=DESCRIPTION)
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    add_commands(parser)
    return execute(parser.parse_args(argv))
