"""Makes what tests share importable from every folder."""

import sys
from pathlib import Path

import pytest


sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session", autouse=True)
def pages_without_pictures():
    """Every saved result gets a page; drawing its pictures takes longer than most tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("optimum_structprune.saving.page.pictures.can_draw", lambda: False)
        yield
