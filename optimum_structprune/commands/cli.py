"""The commands of `structprune`, which `optimum-cli structprune` shares."""

from __future__ import annotations

import os
import sys
import traceback
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

from .. import __version__
from ..errors import StructPruneError, one_line
from .output import Result, check_output, show, working


DESCRIPTION = "Structured pruning of Hugging Face models."
# Each is a module here with NAME, HELP, add_arguments(parser) and run(args) -> Result. `optimum-cli` imports them
# all on every call, so what is heavy is imported inside add_arguments() and run().
COMMANDS = (
    "prune",
    "sweep",
    "calibrate",
    "plan",
    "recover",
    "evaluate",
    "compare",
    "report",
    "benchmark",
    "inspect",
    "export",
)
# With this variable set to 1 in the environment, every error shows its traceback.
DEBUG = "STRUCTPRUNE_DEBUG"
# Libraries that read what a user names: what goes wrong anywhere in them is taken for a fault of the input.
READERS = {
    "datasets",
    "httpx",
    "httpx2",
    "huggingface_hub",
    "jinja2",
    "lm_eval",
    "pandas",
    "pyarrow",
    "requests",
    "safetensors",
    "safetensors_rust",
    "tokenizers",
    "yaml",
}
# Libraries that run models too: only what they raise themselves is taken for that.
RUNNERS = {"peft", "transformers"}


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
    """Run the chosen command, show its result and return its exit code.

    What a user can cause, also what is found half-way through a model, is one line without a traceback and exit code
    2. Anything else that goes wrong is a line too, with exit code 1; see `DEBUG`. An interruption is exit code 130.

    Of several processes that a launcher has started, the first one shows the result, and the others say no more than
    what goes wrong in them.
    """
    number = int(os.environ.get("RANK", "0"))
    try:
        check_output(args)
        with working(args, silent=number > 0):
            result = args.run(args)
        if not isinstance(result, Result):
            return result
        if number == 0:
            show(result, args)
        return result.code
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if os.environ.get(DEBUG, "0") not in ("", "0"):
            traceback.print_exc()
        code, text = explained(error)
        where = f" in process {number}" if number else ""
        sys.stderr.write(f"structprune: error{where}: {one_line(text)}\n")
        return code


def explained(error: Exception) -> tuple[int, str]:
    """The exit code that an error stands for, and the error in words."""
    if isinstance(error, StructPruneError):
        return 2, str(error)
    text = str(error)
    if isinstance(error, MemoryError) or "OutOfMemory" in type(error).__name__ or "can't allocate memory" in text:
        return 2, f"There is not enough memory: {text or type(error).__name__}"
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return 2, f"{error.filename}: {error.strerror}."
    text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    if isinstance(cause := error.__cause__, Exception) and str(cause) not in text:
        text += f" (because of {type(cause).__name__}: {cause})"
    if isinstance(error, OSError) or _of_input(error):
        return 2, text
    return 1, f"{text}. This is unexpected: please report it with what {DEBUG}=1 in the environment shows."


def _of_input(error: Exception) -> bool:
    """Whether an error comes from a library that was reading what the user named."""
    if type(error) is Exception:
        return True  # tokenizers raises bare ones, from code that leaves no frames
    package = __package__.partition(".")[0]
    called: list[str] = []  # the libraries in the order of the calls, since the last call inside this package
    for frame, _ in traceback.walk_tb(error.__traceback__):
        name = str(frame.f_globals.get("__name__")).partition(".")[0]
        called = [] if name == package else [*called, name]
    raised = {*called[-1:], type(error).__module__.partition(".")[0]}
    return bool(READERS.intersection(called) or (READERS | RUNNERS) & raised)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the console script `structprune` and return its exit code."""
    parser = ArgumentParser("structprune", description=DESCRIPTION)
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    add_commands(parser)
    return execute(parser.parse_args(argv))
