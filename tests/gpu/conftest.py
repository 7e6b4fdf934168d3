"""Run the tests of each file on simulated GPUs in one child process, and repeat their reports in this process.

The runtime of the devices has to be loaded before torch, and other tests should not run with it.
"""

import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
from gpu.runtime import missing


HERE = Path(__file__).parent
TESTS = HERE.parent
CHILD = "gpu.child"
REPORTS = "SIMULATED_GPU_REPORTS"
REASON = missing()
# The reports of each test, by its id.
_reports: dict[str, list] = {}
# The files whose tests have run.
_finished: set[Path] = set()


def pytest_collection_modifyitems(items):
    for item in items:
        if REASON is not None and HERE in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=REASON))


def pytest_runtest_protocol(item, nextitem):
    # pytest calls this hook for the tests of all folders.
    if REASON is not None or CHILD in sys.modules or HERE not in item.path.parents:
        return None

    if item.path not in _finished:
        _run_in_child(item)

    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for data in _reports[item.nodeid]:
        report = item.config.hook.pytest_report_from_serializable(config=item.config, data=data)
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


def _run_in_child(item):
    """Run all selected tests in the file of an item in one process, and keep their reports."""
    selected = [selected_item for selected_item in item.session.items if selected_item.path == item.path]
    reports = Path(item.config.rootpath, "build", "simulator", f"reports-{os.getpid()}.jsonl")
    reports.parent.mkdir(parents=True, exist_ok=True)
    reports.unlink(missing_ok=True)

    search_path = str(TESTS)
    if os.environ.get("PYTHONPATH"):
        search_path += os.pathsep + os.environ["PYTHONPATH"]
    environment = os.environ | {"PYTHONPATH": search_path, REPORTS: str(reports)}
    # The child is not a worker of xdist.
    for name in ("PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT", "PYTEST_ADDOPTS"):
        environment.pop(name, None)
    command = [sys.executable, "-m", "pytest", "-q", "-p", CHILD, "-p", "no:cacheprovider"]
    command += [selected_item.nodeid for selected_item in selected]
    process = subprocess.run(command, cwd=item.config.rootpath, env=environment, capture_output=True, text=True)

    by_test = defaultdict(list)
    if reports.exists():
        for line in reports.read_text(encoding="utf-8").splitlines():
            data = json.loads(line)
            by_test[data["nodeid"]].append(data)
        reports.unlink()

    message = f"The process of the tests ended with {process.returncode}.\n{process.stdout}{process.stderr}"
    for selected_item in selected:
        if not by_test[selected_item.nodeid]:
            by_test[selected_item.nodeid] = [_failure(selected_item, message)]
    _reports.update(by_test)
    _finished.add(item.path)


def _failure(item, text):
    """Return the report of a test that the child process did not finish."""
    report = pytest.TestReport(item.nodeid, item.location, {}, "failed", text, "call")
    return item.config.hook.pytest_report_to_serializable(config=item.config, report=report)
