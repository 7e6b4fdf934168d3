"""Other text is text that a run does not calibrate on. It is measured like a domain, and its source is reported."""

from copy import deepcopy
from unittest.mock import Mock, patch

import pytest
import results
import torch
from models import real_text_model

from optimum_structprune import DomainConfig, StructPruneConfig, StructPruner
from optimum_structprune.domains import generated
from optimum_structprune.domains import unseen as unseen_module
from optimum_structprune.domains.load import load_domains
from optimum_structprune.domains.manifest import Manifest
from optimum_structprune.domains.unseen import respelled, texts_for_choices, unseen_text
from optimum_structprune.record.view import View
from optimum_structprune.system.margins import MIN_DOCUMENTS, MIN_RELATIVE_MARGIN


@pytest.fixture(scope="module")
def writer():
    """Return a model that writes text, and its tokenizer."""
    return real_text_model()


@pytest.fixture(autouse=True)
def short(tmp_path, monkeypatch):
    """Let models write few tokens, and store them in a folder of this test. Do not use the Hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name, number in {"FIRST_BATCH": 4, "MAX_BATCH": 8, "MAX_TOKENS": 40, "MIN_TOKENS": 8}.items():
        monkeypatch.setattr(generated, name, number)
    for name, number in {"MIN_TOKENS_READ": 64, "MAX_UNSEEN_TOKENS": 560}.items():
        monkeypatch.setattr(unseen_module, name, number)


def settings(sparsity=0.2, **fields) -> StructPruneConfig:
    return StructPruneConfig(sparsity=sparsity, num_samples=12, seq_length=64, **fields)


def read_unseen_text(writer, **fields):
    """Return the domains of a run with these settings, and its unseen text."""
    model, tokenizer = writer
    config = settings(**fields)
    domains = load_domains(config, tokenizer, model)
    return domains, unseen_text(config, model, tokenizer, domains)


@pytest.mark.parametrize("min_tokens", [0, 10**9], ids=["model-written", "built-in"])
@pytest.mark.parametrize("source", ["builtin:math", "builtin:general", "self:any"])
def test_unseen_text_is_excluded_from_calibration(writer, monkeypatch, min_tokens, source):
    monkeypatch.setattr(unseen_module, "MIN_TOKENS_READ", min_tokens)
    texts = [DomainConfig(name="a", source=source)]
    domains, unseen = read_unseen_text(writer, domains=texts, general_share=0.0)

    if min_tokens:
        assert unseen.source == "built-in"
    else:
        assert unseen.source == "model-written"
    assert len(unseen.rows) >= MIN_DOCUMENTS
    assert {len(row) for row in unseen.rows} == {unseen_module.DOCUMENT_TOKENS}
    assert len({tuple(row.tolist()) for row in unseen.rows}) == len(unseen.rows)

    (entry,) = unseen.entries
    documents_of_run = set()
    for domain in domains:
        documents_of_run.update(domain.documents, domain.heldout_documents)
    assert not documents_of_run & set(entry.heldout_documents)

    tokenizer = writer[1]
    samples_of_run = []
    for domain in domains:
        samples = torch.cat([domain.samples, domain.probe_or_heldout])
        samples_of_run += [tokenizer.decode(ids) for ids in samples]
    text_of_run = " ".join(samples_of_run)
    unseen_texts = [tokenizer.decode(row[1:]) for row in unseen.rows]
    assert [text for text in unseen_texts if text in text_of_run] == []


def test_text_for_choices_is_neither_read_nor_measured_by_the_run(writer):
    model, tokenizer = writer
    config = settings(domains=[DomainConfig(name="a", source="builtin:general")], general_share=0.0)
    domains = load_domains(config, tokenizer, model)
    unseen = unseen_text(config, model, tokenizer, domains)
    manifest = Manifest.of(config, domains, tokenizer).with_entries(unseen.entries)

    texts = list(texts_for_choices(config, model, tokenizer, domains, manifest))
    assert [text.source for text in texts] == ["built-in", "model-written"]
    for text in texts:
        documents = text.entries[0].probe_documents
        assert len(documents) == len(text.rows) >= MIN_DOCUMENTS
        assert manifest.uses().keys().isdisjoint(documents)


def test_a_model_that_loses_nothing_has_the_original_perplexity_on_unseen_text(writer):
    model, tokenizer = deepcopy(writer)
    width = model.config.intermediate_size - 128
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight[:, width:] = 0  # No output depends on these channels.

    pruner = StructPruner(settings(sparsity=None, widths={"mlp": width}, refit="none"))
    pruner.prune_model(model, tokenizer)

    unseen = pruner.result.report.unseen
    assert unseen.source == "model-written"
    assert unseen.documents == MIN_DOCUMENTS
    assert unseen.tokens == MIN_DOCUMENTS * (unseen_module.DOCUMENT_TOKENS - 1)
    assert unseen.perplexity.ratio == pytest.approx(1, rel=1e-6)
    assert unseen.perplexity.margin == pytest.approx(MIN_RELATIVE_MARGIN / MIN_DOCUMENTS, rel=1e-3)
    assert "unseen text (sampled from the original model)  1.00×" in str(pruner.result.report)


def test_unseen_text_changes_no_weights(writer, monkeypatch):
    def prune():
        pruner = StructPruner(settings(sparsity=None, widths={"vocab": 350, "mlp": 1024}))
        small = pruner.prune_model(*writer)
        return small.state_dict(), pruner

    weights, pruner = prune()
    monkeypatch.setattr(unseen_module, "TRIES_PER_DOCUMENT", 0)  # no source has a document then
    weights_without, pruner_without = prune()

    assert all(torch.equal(tensor, weights_without[name]) for name, tensor in weights.items())

    entries = pruner.result.manifest.domains
    (unseen_documents,) = (set(entry.heldout_documents) for entry in entries if entry.use == "judged by")
    assert unseen_documents
    assert not any(unseen_documents & set(entry.documents) for entry in entries)
    assert 0 < pruner.result.report.unseen.split_words < 1
    assert "Words now split into more tokens: " in str(pruner.result.report)

    report_without = pruner_without.result.report
    assert report_without.unseen is None
    assert "unseen text" not in str(report_without)
    assert "Unseen text was not measured, because none was available." in list(View(report_without).details)


def test_the_same_tokenizer_splits_no_words(writer):
    tokenizer = writer[1]
    assert respelled([["some words of a text"]], tokenizer, tokenizer) == 0
    assert respelled([], tokenizer, tokenizer) == 0


def test_unseen_text_comes_from_the_hub_first_and_is_stored(writer, monkeypatch):
    sentence = "Text number {} of the Hub, and it is long enough to be of use: {} and {}. "
    texts = [sentence.format(n, n * n, n**3) * 2 for n in range(120)]
    sources = []

    def read_nine_documents(domain, *args):
        sources.append(domain.source)
        start = 9 * len(sources)
        return iter(texts[start : start + 9])

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *args, **kwargs: None)
    monkeypatch.setattr(unseen_module, "documents", read_nine_documents)
    _, unseen = read_unseen_text(writer)
    assert unseen.source == "from the Hub"
    assert len(sources) == 10

    # A second run reads the stored text.
    _, stored = read_unseen_text(writer)
    assert len(sources) == 10
    assert all(map(torch.equal, unseen.rows, stored.rows))

    # The language of text of the Hub is unknown.
    _, german = read_unseen_text(writer, languages=["de"])
    assert german.source == "model-written"


def test_without_the_hub_the_model_writes_unseen_text_or_it_is_built_in(writer, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", Mock(side_effect=OSError("no network")))
    _, model_written = read_unseen_text(writer)
    assert model_written.source == "model-written"

    monkeypatch.setattr(generated, "MIN_TOKENS", 10**6)  # all text of the model is too short
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "empty"))
    _, builtin = read_unseen_text(writer)
    assert builtin.source == "built-in"
    assert builtin.rows

    report = results.report([1.0], unseen_ratio=1.0, source=builtin.source)
    assert any("simpler than most" in line for line in View(report).details)


def test_a_model_writes_unseen_text_in_the_languages_to_keep(writer):
    with patch.object(generated, "self_documents", wraps=generated.self_documents) as self_documents:
        read_unseen_text(writer, languages=["de"])

    openings = self_documents.call_args.args[-1]
    assert all(len(opening.split()) <= 2 for opening in openings)
    assert any("Guten" in opening for opening in openings)
    assert len(set(openings)) > 4
