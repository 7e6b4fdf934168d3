"""The pruned model that recoveries are tried on."""

from copy import deepcopy

import pytest
from models import build, config, tokenizer

from optimum_structprune import prune_model


@pytest.fixture(scope="package")
def small():
    """What no test changes."""
    return prune_model(build("llama-tied"), config(), tokenizer())


@pytest.fixture
def pruned(small):
    return deepcopy(small)
