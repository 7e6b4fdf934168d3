"""Makes what tests share importable from every folder."""

import sys
from pathlib import Path

import pytest
from hypothesis import settings


settings.register_profile("nightly")
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session", autouse=True)
def written_text_of_the_session(tmp_path_factory):
    """What models write is kept for the session, and not among the files of the user."""
    with pytest.MonkeyPatch.context() as patch:
        home = str(tmp_path_factory.mktemp("home"))
        patch.setattr("huggingface_hub.constants.HF_HOME", home)
        patch.setenv("HF_HOME", home)
        yield


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """The tests of a file stay on one worker, where they share what they have made; slow files come first."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
    for item in items:
        if not item.get_closest_marker("xdist_group"):
            item.add_marker(pytest.mark.xdist_group(str(item.path)))
