"""What does not fit is refused before text is read, and what fits never is."""

import pytest
import torch
from helpers import same_weights
from models import build, config, tokenizer

from optimum_structprune import DomainConfig, StructPruneError, prune_model
from optimum_structprune.pruning import room


@pytest.mark.parametrize("inplace", [True, False])
def test_too_little_memory_is_refused_before_text_is_read(inplace, monkeypatch):
    monkeypatch.setattr(room, "free_bytes", lambda device: 10**6)
    model, before = build("llama-tied"), build("llama-tied")
    nowhere = [DomainConfig(name="a", source="/nowhere.txt")]
    with pytest.raises(
        StructPruneError, match=r"takes at least .* MB on cpu .*, and 1\.0 MB are free; .*batch_size"
    ) as found:
        prune_model(model, config(domains=nowhere), tokenizer(), inplace=inplace)
    assert ("inplace=True" in str(found.value)) != inplace and "--offload disk" in str(found.value)
    assert same_weights(model, before)


@pytest.mark.parametrize("free", [None, 10**9])
def test_what_fits_or_cannot_be_told_is_pruned(free, monkeypatch):
    monkeypatch.setattr(room, "free_bytes", lambda device: free)
    assert prune_model(build("llama-tied"), config(), tokenizer()).config.intermediate_size == 24


def test_the_cpu_says_what_is_free_and_other_devices_do_not():
    found = room.free_bytes(torch.device("cpu"))
    assert found is None or 0 < found < 2**60
    assert room.free_bytes(torch.device("meta")) is None
