"""Load the simulated GPUs and write all reports into a file, as a plugin of pytest in a child process.

`conftest.py` starts the child process.

To debug a test, run pytest with this plugin in one process:

    PYTHONPATH=tests python -m pytest -p gpu.child tests/gpu/test_prune.py
"""

import json
import os

from gpu.runtime import load


load()
# This variable holds the path of the file for the reports.
REPORTS = "SIMULATED_GPU_REPORTS"


class Recorder:
    """Write each report as one line of JSON."""

    def __init__(self, config):
        self.config = config

    def pytest_runtest_logreport(self, report):
        data = self.config.hook.pytest_report_to_serializable(config=self.config, report=report)
        with open(os.environ[REPORTS], "a", encoding="utf-8") as file:
            file.write(json.dumps(data) + "\n")


def pytest_configure(config):
    if REPORTS in os.environ:
        config.pluginmanager.register(Recorder(config))
