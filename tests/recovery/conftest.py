"""Fixtures of a pruned model to recover."""

from copy import deepcopy

import pytest
from models import build, config, tokenizer

from optimum_structprune import prune_model


@pytest.fixture(scope="package")
def small():
    """Return a pruned model that no test may change."""
    return prune_model(build("llama-tied"), config(), tokenizer())


@pytest.fixture
def pruned(small):
    """Return a copy of `small` that a test may change."""
    return deepcopy(small)
