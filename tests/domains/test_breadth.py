"""Text of every kind that the model writes beside the domains of a user."""

import logging
from dataclasses import replace

import pytest
import torch
from models import build, config, real_text_model, tokenizer

from optimum_structprune import DomainConfig, SelfTextConfig, StructPruneConfig, StructPruneError, StructPruner
from optimum_structprune.domains import breadth
from optimum_structprune.domains.breadth import with_written_text


TEXTS = [f"Tom gave {i} red apples to Ann, and {i + 1} green ones to her sister." for i in range(200)]


@pytest.fixture(scope="module")
def writer():
    return real_text_model()


@pytest.fixture
def own(tmp_path):
    """A config with a domain of its own, and nothing said of breadth."""
    short = SelfTextConfig(batch_size=4, max_new_tokens=24, min_tokens=8, cache_dir=str(tmp_path / "cache"))
    fields = {"widths": {"mlp": 24}, "num_samples": 10, "seq_length": 24, "self_text": short}
    return StructPruneConfig(domains=[DomainConfig("own", TEXTS)], **fields)


def test_a_model_writes_a_fifth_beside_the_domains(writer, own, tmp_path):
    pruner = StructPruner(own)
    pruned = pruner.prune_model(*writer)
    sizes = {entry.name: (entry.origin["source"], entry.calibration_tokens) for entry in pruner.manifest.domains}
    assert sizes["broad"] == ("self:any", 2 * 24) and sizes["own"][1] == 8 * 24
    assert pruner.config is own and pruner.used_config == replace(own, broad_text="self:any")
    pruner.save(pruned, tmp_path / "out", writer[1])
    saved = StructPruneConfig.from_pretrained(tmp_path / "out")
    assert (saved.broad_text, saved.texts[-1].source) == ("self:any", "self:any")


def test_the_share_may_be_another_or_none(writer, own):
    for share, count in ((0.5, 5), (0.0, 0)):
        pruner = StructPruner(replace(own, breadth=share))
        pruner.prune_model(*writer)
        tokens = {entry.name: entry.calibration_tokens for entry in pruner.manifest.domains}
        assert tokens.get("broad", 0) == count * 24 and sum(tokens.values()) == 240


def test_where_no_domain_is_named_the_broad_half_is_built_in(writer, own):
    alone = replace(own, domains=None)
    assert with_written_text(alone, *writer) is alone
    assert (alone.texts[-1].source, alone.texts[-1].weight) == ("builtin:broad-prose-code-math", 3.0)


@pytest.mark.parametrize("case", ["encoder", "encoder-decoder", "no tokenizer", "offloaded"])
def test_who_cannot_write_reads_no_more(writer, own, case, monkeypatch):
    model, reader = writer
    if case == "no tokenizer":
        reader = None
    elif case == "offloaded":
        monkeypatch.setattr(breadth, "is_offloaded", lambda model: True)
    else:
        model = build("bert" if case == "encoder" else "t5")
    assert with_written_text(own, model, reader) is own


def test_what_is_said_is_kept(writer, own):
    for said in (replace(own, breadth=0), replace(own, broad_text="builtin:broad"), replace(own, stats="folder")):
        assert with_written_text(said, *writer) is said


def test_a_model_that_writes_nothing_of_use_is_pruned_on_the_domains_alone(writer, own, caplog):
    vain = replace(own, self_text=replace(own.self_text, min_tokens=1_000))
    with caplog.at_level(logging.WARNING):
        pruner = StructPruner(vain)
        pruner.prune_model(*writer)
    assert [entry.name for entry in pruner.manifest.domains] == ["own"]
    assert "No text of every kind is written: self:any" in caplog.text


def test_a_generator_is_not_used_up_by_what_the_model_cannot_write(writer, own):
    vain = replace(own, self_text=replace(own.self_text, min_tokens=1_000))
    pruner = StructPruner(replace(vain, domains=[DomainConfig("own", iter(TEXTS))]))
    pruner.prune_model(*writer)
    assert [entry.name for entry in pruner.manifest.domains] == ["own"]


def test_inputs_are_all_that_is_read():
    settings = StructPruneConfig(widths={"mlp": 24}, domains=config().domains, num_samples=8, seq_length=24)
    pruner = StructPruner(settings)
    pruner.prune_model(build("llama-tied"), tokenizer(), inputs={"ids": torch.arange(240).view(10, 24) % 60})
    assert [entry.name for entry in pruner.manifest.domains] == ["ids"]


def test_a_source_that_is_none_is_an_error(writer, own):
    with pytest.raises(StructPruneError, match="A model does not write 'anything' itself"):
        StructPruner(replace(own, broad_text="self:anything")).prune_model(*writer)
