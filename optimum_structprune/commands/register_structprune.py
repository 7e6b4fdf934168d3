"""Register `optimum-cli structprune`. The build also installs this file as a module of `optimum.commands.register`.

An error or a slow import here would affect every user of `optimum-cli`.
"""

import sys
from argparse import ArgumentParser

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

# The import is absolute because the installed copy is in another package.
from optimum_structprune.commands.cli import DESCRIPTION, add_commands, execute


class StructPruneCommand(BaseOptimumCLICommand):
    """`optimum-cli structprune <command>`."""

    COMMAND = CommandInfo(name="structprune", help=DESCRIPTION)

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Add the commands of `structprune`."""
        add_commands(parser)

    def run(self) -> None:
        """Run the chosen command and exit with its code."""
        sys.exit(execute(self.args))


REGISTER_COMMANDS = [StructPruneCommand]
