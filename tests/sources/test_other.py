"""Other text is none that a run reads, is measured beside the kinds that it reads, and says where it comes from."""

from unittest.mock import Mock, patch

import pytest
import results
import torch
from models import real_text_model

from optimum_structprune import DomainConfig, StructPruneConfig, StructPruner
from optimum_structprune.domains import generated
from optimum_structprune.domains.load import load_domains
from optimum_structprune.forward.metrics import MIN_DOCUMENTS, UNSEEN
from optimum_structprune.record.summary import details
from optimum_structprune.sources import other
from optimum_structprune.sources.other import other_text, respelled


@pytest.fixture(scope="module")
def writer():
    return real_text_model()


@pytest.fixture(autouse=True)
def short(tmp_path, monkeypatch):
    """Few tokens are written and kept, in a folder of this test, and the Hub is not asked."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name, number in {"MIN_BATCH": 4, "MAX_BATCH": 8, "MAX_TOKENS": 40, "MIN_TOKENS": 8}.items():
        monkeypatch.setattr(generated, name, number)
    for name, number in {"MIN_TOKENS_READ": 64, "MAX_TOKENS": 560}.items():
        monkeypatch.setattr(other, name, number)


def settings(**fields) -> StructPruneConfig:
    return StructPruneConfig(**{"sparsity": 0.2, "num_samples": 12, "seq_length": 64, **fields})


def read(writer, **fields):
    model, tokenizer = writer
    config = settings(**fields)
    domains = load_domains(config, tokenizer, model)
    return (config, model, tokenizer, domains), other_text(config, model, tokenizer, domains)


@pytest.mark.parametrize("reads", [0, 10**9], ids=["model-written", "built-in"])
@pytest.mark.parametrize("source", ["builtin:math", "builtin:general", "self:any"])
def test_other_text_is_none_that_calibrates_or_chooses(writer, monkeypatch, reads, source):
    monkeypatch.setattr(other, "MIN_TOKENS_READ", reads)
    domains = [DomainConfig(name="a", source=source)]
    (_, _, tokenizer, loaded), (where, rows, (entry,)) = read(writer, domains=domains, general_share=0.0)
    assert where == ("built-in" if reads else "model-written")
    assert len(rows) >= MIN_DOCUMENTS and {len(row) for row in rows} == {other.DOCUMENT_TOKENS}
    assert len({tuple(row.tolist()) for row in rows}) == len(rows)
    assert not {*entry.heldout_documents} & {name for of in loaded for name in (*of.documents, *of.heldout_documents)}
    chose = " ".join(tokenizer.decode(ids) for of in loaded for ids in torch.cat([of.samples, of.probe_or_heldout]))
    assert [text for row in rows if (text := tokenizer.decode(row[1:])) in chose] == []


def test_a_model_that_loses_nothing_reads_other_text_as_the_dense_one_does(writer):
    model, tokenizer = writer
    pruner = StructPruner(settings(sparsity=None, widths={"mlp": model.config.intermediate_size}))
    pruner.prune_model(model, tokenizer)
    unseen = pruner.report.unseen
    assert unseen.perplexity.ratio == pytest.approx(1, rel=1e-6)
    assert (unseen.source, unseen.documents) == ("model-written", MIN_DOCUMENTS)
    assert unseen.perplexity.margin == pytest.approx(UNSEEN / MIN_DOCUMENTS, rel=1e-3)
    assert unseen.tokens == MIN_DOCUMENTS * (other.DOCUMENT_TOKENS - 1)
    assert "unseen text (sampled from the original model)  1.00×" in str(pruner.report)


def test_nothing_is_chosen_by_other_text(writer, monkeypatch):
    def pruned():
        pruner = StructPruner(settings(sparsity=None, widths={"vocab": 350, "mlp": 1024}))
        return pruner.prune_model(*writer).state_dict(), pruner.report, pruner.manifest

    before, with_text, manifest = pruned()
    monkeypatch.setattr(other, "TRIES_PER_DOCUMENT", 0)  # no document of any source
    after, without, _ = pruned()
    assert all(torch.equal(of, after[name]) for name, of in before.items())
    used = manifest.domains
    (judged,) = ({*of.heldout_documents} for of in used if of.use == "judged by")
    assert judged and not any(judged & {*of.documents} for of in used)
    assert 0 < with_text.unseen.split_words < 1 and "Words now split into more tokens: " in str(with_text)
    assert respelled([["some words of a text"]], writer[1], writer[1]) == 0 == respelled([], writer[1], writer[1])
    assert without.unseen is None and "unseen text" not in str(without)
    assert "Unseen text was not measured, because none was available." in [*details(without)]


def test_what_comes_first_is_the_hub_then_the_model_then_built_in_text(writer, monkeypatch):
    asked = []
    texts = [
        f"Text number {n} of the Hub, and it is long enough to be of use: {n * n} and {n**3}. " * 2 for n in range(120)
    ]

    def documents(domain, *more):
        asked.append(domain.source)
        return iter(texts[len(asked) * 9 :][:9])

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with monkeypatch.context() as patch:
        patch.setattr(other, "documents", documents)
        patch.setattr("huggingface_hub.HfApi.dataset_info", lambda *a, **k: None)
        _, (where, rows, _) = read(writer)
        assert where == "from the Hub" and len(asked) == 10
        _, (_, again, _) = read(writer)  # it is kept on the disk
        assert len(asked) == 10 and all(map(torch.equal, rows, again))
        # Text of the Hub is in no language that was named.
        assert read(writer, languages=["de"])[1][0] == "model-written"

    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", other.constants.HF_HOME + "-2")
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", Mock(side_effect=OSError("no network")))
    assert read(writer)[1][0] == "model-written"
    monkeypatch.setattr(generated, "MIN_TOKENS", 10**6)  # nothing that it writes is of use
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", other.constants.HF_HOME + "-3")
    _, (where, rows, _) = read(writer)
    assert where == "built-in" and rows
    assert any("simpler than most" in line for line in details(results.report([1.0], unseen_ratio=1.0, source=where)))


def test_what_a_model_writes_begins_in_the_languages_to_keep(writer):
    with patch.object(generated, "self_documents", wraps=generated.self_documents) as written:
        read(writer, languages=["de"])
    openings = written.call_args.args[-1]
    assert all(len(opening.split()) <= 2 for opening in openings)
    assert any("Guten" in opening for opening in openings) and len(set(openings)) > 4
