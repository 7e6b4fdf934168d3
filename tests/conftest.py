"""Set up all tests: profiles of hypothesis, a folder for caches, and the order of the files."""

import gc
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from xdist.scheduler import LoadScopeScheduling


# A busy machine also draws examples slowly, so slowness is no failure.
for profile in ("default", "nightly"):
    settings.register_profile(profile, settings(), deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("default")

# All folders import the shared modules in this folder.
sys.path.insert(0, str(Path(__file__).parent))
FIRST = ("test_docs", "test_extending", "test_golden", "test_kills", "test_processes", "test_trainer")


@pytest.fixture(scope="session", autouse=True)
def written_text_of_the_session(tmp_path_factory):
    """Cache model-written text in a folder of this session instead of the home of the user."""
    with pytest.MonkeyPatch.context() as patch:
        home = str(tmp_path_factory.mktemp("home"))
        patch.setattr("huggingface_hub.constants.HF_HOME", home)
        patch.setenv("HF_HOME", home)
        yield


def pytest_collection_modifyitems(items):
    """Run the files that take longest first, so that no worker starts a long file at the end."""
    items.sort(key=lambda item: item.path.stem not in FIRST)


def pytest_collection_finish():
    """Exclude the million objects of imported libraries from each collection of garbage."""
    gc.collect()
    gc.freeze()


class ByFile(LoadScopeScheduling):
    """Run all tests of a file on one worker, where they share fixtures. Pages of the docs may run on any worker."""

    def _split_scope(self, nodeid: str) -> str:
        if nodeid.endswith(".md]"):
            return nodeid
        return nodeid.partition("::")[0]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Replace the groups of xdist, because pytest 9.2 ignores them."""
    return ByFile(config, log)
