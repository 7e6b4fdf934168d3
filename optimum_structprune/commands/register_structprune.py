"""Register `optimum-cli structprune`. The build also installs this file as a module of `optimum.commands.register`.

An error or a slow import here would affect every user of `optimum-cli`.
"""

import sys
from argparse import ArgumentParser
from typing import Any

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

# The import is absolute because the installed copy is in another package.
from optimum_structprune.commands.cli import DESCRIPTION, add_commands, execute


class StructPruneCommand(BaseOptimumCLICommand):
    """`optimum-cli structprune <command>`."""

    COMMAND = CommandInfo(name="structprune", help=DESCRIPTION)

    def __init__(self, subparsers: Any, *args: Any, **options: Any):
        if "from_defaults_factory" not in options and self.COMMAND.name in subparsers.choices:
            # `optimum-cli` registers this class once for each copy of this file on the path.
            options.update(from_defaults_factory=True, parser=subparsers.choices[self.COMMAND.name])
        super().__init__(subparsers, *args, **options)

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Add the commands of `structprune`."""
        add_commands(parser)

    def run(self) -> None:
        """Run the chosen command and exit with its code."""
        sys.exit(execute(self.args))


REGISTER_COMMANDS = [StructPruneCommand]
