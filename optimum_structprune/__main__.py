"""`python -m optimum_structprune` is `structprune`, as launchers of several processes call it."""

import sys

from .commands.cli import main


sys.exit(main())
