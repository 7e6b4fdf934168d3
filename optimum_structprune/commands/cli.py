"""The commands of `structprune`, which `optimum-cli structprune` shares."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from importlib import import_module

from .. import __version__
from ..errors import StructPruneError


DESCRIPTION = "Structured pruning of Hugging Face models."
# Each is a module here with NAME, HELP, add_arguments(parser) and run(args) -> int. `optimum-cli` imports them all
# on every call, so what is heavy is imported inside run().
COMMANDS = ("prune", "calibrate", "plan", "recover", "evaluate", "inspect", "export")


def add_commands(parser: ArgumentParser) -> None:
    """Add one subparser per command; `execute` runs the one that the arguments choose."""

    def help_(args: Namespace) -> int:
        parser.print_help()
        return 2

    parser.set_defaults(run=help_)
    subparsers = parser.add_subparsers(title="commands", metavar="<command>")
    for name in COMMANDS:
        command = import_module(f"{__package__}.{name}")
        subparser = subparsers.add_parser(command.NAME, help=command.HELP, description=command.HELP)
        command.add_arguments(subparser)
        subparser.set_defaults(run=command.run)


def execute(args: Namespace) -> int:
    """Run the chosen command; a user's mistake is one message without a traceback, and exit code 2."""
    try:
        return args.run(args)
    except StructPruneError as error:
        sys.stderr.write(f"structprune: error: {' '.join(str(error).split())}\n")
        return 2
    except KeyboardInterrupt:
        return 130


def main(argv: Sequence[str] | None = None) -> int:
    """The console script `structprune`."""
    parser = ArgumentParser("structprune", description=DESCRIPTION)
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    add_commands(parser)
    return execute(parser.parse_args(argv))
