"""Makes what tests share importable from every folder."""

import gc
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from xdist.scheduler import LoadScopeScheduling


# A busy machine is slow at everything, drawing examples included, which says nothing of the code.
for profile in ("default", "nightly"):
    settings.register_profile(profile, settings(), deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("default")
sys.path.insert(0, str(Path(__file__).parent))
FIRST = ("test_docs", "test_extending", "test_golden", "test_kills", "test_processes", "test_trainer")


@pytest.fixture(scope="session", autouse=True)
def written_text_of_the_session(tmp_path_factory):
    """What models write is kept for the session, and not among the files of the user."""
    with pytest.MonkeyPatch.context() as patch:
        home = str(tmp_path_factory.mktemp("home"))
        patch.setattr("huggingface_hub.constants.HF_HOME", home)
        patch.setenv("HF_HOME", home)
        yield


def pytest_collection_modifyitems(items):
    """Files that take longest come first, so that no worker is left with one of them at the end."""
    items.sort(key=lambda item: item.path.stem not in FIRST)


def pytest_collection_finish():
    """The million objects of imported libraries are not searched at every collection of garbage."""
    gc.collect()
    gc.freeze()


class ByFile(LoadScopeScheduling):
    """The tests of a file stay on one worker, where they share what they have made; each page of the docs is free."""

    def _split_scope(self, nodeid: str) -> str:
        return nodeid if nodeid.endswith(".md]") else nodeid.partition("::")[0]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """In the place of xdist's own groups, which pytest 9.2 does not see."""
    return ByFile(config, log)
