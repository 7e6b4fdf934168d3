"""A cache of text skips what a kill or a damage has left in it."""

import pytest
from helpers import flipped_bytes

from optimum_structprune.system.stored import TextCache


BATCHES = {"0": ["a text", "of words"], "1": [3, 4.5, None], "2": []}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path))
    cache = TextCache("kind", "a setting")
    for name, batch in BATCHES.items():
        cache.add(name, batch)
    return cache


def test_a_flipped_byte_costs_one_batch(cache):
    assert cache.read() == BATCHES
    for place in flipped_bytes(cache.path, cache.path.stat().st_size):
        batches = cache.read()
        assert batches.items() <= BATCHES.items(), place
        assert len(batches) >= len(BATCHES) - 2, place


def test_the_line_of_a_killed_process_is_skipped(cache):
    with cache.path.open("a") as file:
        file.write('\n["3", ["half')
    cache.add("4", ["after"])
    with cache.path.open("a") as file:
        file.write('[1, 2]\n7\n"text"\n')
    assert cache.read() == BATCHES | {"4": ["after"]}
