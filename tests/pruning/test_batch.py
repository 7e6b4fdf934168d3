"""`batch_size="auto"` is the most that the device has room for, and changes nothing else."""

from dataclasses import replace

import pytest
import torch
from helpers import same_weights
from models import build, config, documents, tokenizer

from optimum_structprune import DomainConfig, StructPruneConfig, StructPruneError, StructPruner, calibrate
from optimum_structprune.arch.load import describe
from optimum_structprune.domains.load import load_domains
from optimum_structprune.pruning import room
from optimum_structprune.pruning.evidence import Evidence
from optimum_structprune.pruning.room import ERROR, Text, Workload, largest_estimated, with_batch_size
from optimum_structprune.widths.budget import widths_of


@pytest.fixture
def text():
    """More samples than a batch can have."""
    return [DomainConfig(name="a", source=documents(200))]


def evidence_on(device, text, monkeypatch):
    """Evidence that says `auto`, of a model whose compute device is said to be another one."""
    model, settings = build("llama-tied"), config(domains=text, num_samples=40, batch_size="auto")
    monkeypatch.setattr(room, "compute_device", lambda model: torch.device(device))
    return Evidence.of(settings, load_domains(settings, tokenizer()), model.device), describe(model), model


def test_it_is_a_field_like_any_other(tmp_path):
    settings = StructPruneConfig(sparsity=0.2, batch_size="auto")
    settings.to_yaml(tmp_path / "a.yaml")
    assert StructPruneConfig.from_yaml(tmp_path / "a.yaml") == settings
    with pytest.raises(StructPruneError, match="batch_size"):
        StructPruneConfig(sparsity=0.2, batch_size="most")


def test_a_run_keeps_to_it_and_gives_the_same_model(text, tmp_path):
    found = []
    for batch_size in (4, "auto"):
        pruner = StructPruner(config(domains=text, batch_size=batch_size))
        found.append(pruner.prune_model(build("llama-tied"), tokenizer()))
    assert same_weights(*found)
    assert pruner.config.batch_size == "auto"
    calibrate(build("llama-tied"), tokenizer(), pruner.config, tmp_path / "stats")


def test_a_device_without_room_gets_smaller_batches(text, monkeypatch):
    evidence, arch, model = evidence_on("cuda", text, monkeypatch)
    sizes = []

    def run(base, samples):
        sizes.append(len(samples))
        if len(samples) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(room, "MOST", 8)
    monkeypatch.setattr(room, "free_bytes", lambda device: None)
    monkeypatch.setattr(room, "run_model", run)
    found = with_batch_size(evidence, arch, model, {"mlp": 24}).batch_size
    assert sizes[0] == room.MOST and found == sizes[-1] <= 5
    monkeypatch.setattr(
        room, "run_model", lambda *args: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory."))
    )
    with pytest.raises(StructPruneError, match="one sample of 24 tokens is too much"):
        with_batch_size(evidence, arch, model, {"mlp": 24})


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_the_estimate_fits_and_twice_as_much_would_not(share, text):
    model, settings = build("llama-tied"), config(domains=text, num_samples=64, seq_length=512, batch_size="auto")
    arch = describe(model)
    work = Workload(settings, arch, model, widths_of(settings, arch, model), 4, Text.of(settings))

    def above(size):
        return replace(work, text=work.text._replace(batch=size)).need().above * (1 + ERROR)

    free = int(above(1) + share * (above(16) - above(1)))
    size = largest_estimated(work, 64, free, False)
    assert above(size) <= free < above(2 * size) or size == 64
    assert largest_estimated(work, 64, None, False) == 64
    assert largest_estimated(work, 64, 0, False) == 1
