"""Text of every kind that the model writes beside the domains of a user."""

import logging
from dataclasses import replace

import pytest
import torch
from models import build, config, real_text_model, tokenizer

from optimum_structprune import DomainConfig, StructPruneConfig, StructPruneError, StructPruner
from optimum_structprune.domains import generated, load
from optimum_structprune.domains.load import can_write, texts_of, with_written_text
from optimum_structprune.domains.manifest import CALIBRATED


TEXTS = [f"Tom gave {i} red apples to Ann, and {i + 1} green ones to her sister." for i in range(200)]


def pruning_of(*domains, **fields) -> StructPruneConfig:
    return StructPruneConfig(sparsity=0.2, domains=[DomainConfig(*domain) for domain in domains], **fields)


def test_general_text_adds_a_domain_and_leaves_the_others_as_they_are():
    pair = [("a", "a.txt", 2), ("b", "b.txt")]
    alone = pruning_of(*pair)
    unnamed = replace(alone, domains=None)
    half = texts_of(unnamed)[-1]
    assert with_written_text(unnamed) is unnamed
    assert (half.source, half.weight) == ("builtin:general-prose-code-math", 3.0)
    *kept, general = texts_of(replace(alone, general_share=0.25))
    assert kept == alone.domains == texts_of(replace(alone, general_share=0)) == texts_of(alone)
    assert (general.source, general.weight) == ("builtin:general", 1.0)
    assert texts_of(StructPruneConfig(sparsity=0.2))[-1].weight == 3.0
    written = replace(alone, general_text="self:any")
    assert texts_of(written) == [*kept, DomainConfig("general", "self:any", 0.75)]
    assert with_written_text(alone) == written
    trimmed = with_written_text(replace(alone, sparsity=None, widths={"vocab": 300}))
    assert texts_of(trimmed) == [*kept, DomainConfig("general", "builtin:general-languages", 0.75)]
    quarter = with_written_text(replace(alone, general_share=0.25))
    assert texts_of(quarter)[-1] == DomainConfig("general", "self:any", 1.0)


def test_general_text_is_left_out_where_it_has_no_place_or_something_is_said_of_it():
    for domain in [("general", "a.txt"), ("a", "self:any"), ("a", "builtin:general-code"), ("a", "preset:general")]:
        alone = pruning_of(domain)
        assert with_written_text(alone) is alone
        with pytest.raises(StructPruneError, match="general_share=0.1 adds a domain 'general'"):
            pruning_of(domain, general_share=0.1)
    pair = [("a", "a.txt"), ("b", "b.txt")]
    for fields in ({"num_samples": 2}, {"general_share": 0}, {"general_text": "builtin:general"}):
        said = pruning_of(*pair, **fields)
        assert with_written_text(said) is said
    with pytest.raises(StructPruneError, match="general_share=0; set general_share=0.2"):
        pruning_of(*pair, general_share=0, general_text="self:any")


@pytest.fixture(scope="module")
def writer():
    return real_text_model()


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A config with a domain of its own, and nothing said of general text; what models write is short."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path))
    for name, number in {"MIN_BATCH": 4, "MAX_BATCH": 8, "MAX_TOKENS": 24, "MIN_TOKENS": 8}.items():
        monkeypatch.setattr(generated, name, number)
    return StructPruneConfig(widths={"mlp": 24}, num_samples=10, seq_length=24, domains=[DomainConfig("own", TEXTS)])


def test_a_model_writes_a_fifth_beside_the_domains(writer, own, tmp_path):
    pruner = StructPruner(own)
    pruned = pruner.prune_model(*writer)
    entries = {entry.name: entry for entry in pruner.manifest.of_use(CALIBRATED)}
    sizes = {name: entry.calibration_tokens for name, entry in entries.items()}
    assert sizes == {"general": 2 * 24, "own": 8 * 24} and entries["general"].origin["source"] == "self:any"
    assert pruner.config is own and pruner.used_config == replace(own, general_text="self:any")
    pruner.save(pruned, tmp_path / "out", writer[1])
    saved = StructPruneConfig.from_pretrained(tmp_path / "out")
    other = StructPruner(replace(own, general_share=0.5))
    other.prune_model(*writer)
    tokens = {entry.name: entry.calibration_tokens for entry in other.manifest.of_use(CALIBRATED)}
    assert tokens == {"own": 120, "general": 120}
    assert (saved.general_text, texts_of(saved)[-1].source) == ("self:any", "self:any")


def test_who_cannot_write_reads_no_more(writer, monkeypatch):
    model, reader = writer
    assert can_write(model, reader) and not can_write(model, None)
    assert not can_write(build("bert"), reader) and not can_write(build("t5"), reader)
    monkeypatch.setattr(load, "is_offloaded", lambda model: True)
    assert not can_write(model, reader)


@pytest.mark.slow
def test_a_model_that_writes_nothing_of_use_is_pruned_on_the_domains_alone(writer, own, caplog, monkeypatch):
    with pytest.raises(StructPruneError, match="A model does not write 'anything' itself"):
        StructPruner(replace(own, general_text="self:anything")).prune_model(*writer)
    monkeypatch.setattr(generated, "MIN_TOKENS", 1_000)
    pruner = StructPruner(replace(own, domains=[DomainConfig("own", iter(TEXTS))]))
    with caplog.at_level(logging.WARNING):
        pruner.prune_model(*writer)
    names = [entry.name for entry in pruner.manifest.of_use(CALIBRATED)]
    assert names == ["own"], "a generator is not used up by then"
    assert "No text of every kind is written: self:any" in caplog.text


def test_inputs_are_all_that_is_read():
    settings = StructPruneConfig(widths={"mlp": 24}, domains=config().domains, num_samples=8, seq_length=24)
    pruner = StructPruner(settings)
    pruner.prune_model(build("llama-tied"), tokenizer(), inputs={"ids": torch.arange(240).view(10, 24) % 60})
    assert [entry.name for entry in pruner.manifest.domains] == ["ids"]
