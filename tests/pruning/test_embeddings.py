"""The vectors that an encoder's report compares: of which text, by which tokenizer, and what is counted."""

import json
from collections import Counter

import pytest
import torch
from helpers import put_into, save_with_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from models import PLAIN, build, documents, fewer_tokens, random_model, real_text_model, tokenizer
from torch.nn.functional import normalize
from transformers import AutoModelForMaskedLM

from optimum_structprune import StructPruner
from optimum_structprune.arch.modules import PROMPTS
from optimum_structprune.pruning.embeddings import (
    COSINE_UNSEEN,
    MOST_SENTENCES,
    NUM_NEIGHBOURS,
    Embeddings,
    Pooling,
    embed,
    embedding_figures,
    kept_share,
    nearness,
    retrieved,
    sentences,
)


def pruned(**fields):
    wide = {**PLAIN, "vocab_size": 400, "max_position_embeddings": 256}
    model, reader = random_model(AutoModelForMaskedLM, "bert", wide), real_text_model()[1]
    pruner = StructPruner(fewer_tokens(num_samples=64, **fields))
    return pruner, pruner.prune_model(model, reader), model, reader


def test_lost_tokens_are_no_longer_reported_as_no_loss(tmp_path):
    pruner, small, model, reader = pruned(widths={"vocab": 300})
    vectors = {name: domain.vectors for name, domain in pruner.report.domains.items()}
    assert vectors.keys() == {"math", "prose"}
    for result in vectors.values():
        assert 0 < result.cosine.pruned < 0.9999
        assert result.cosine_worst <= result.cosine_p5 <= result.cosine.pruned
        assert 0 < result.neighbours.pruned < 1
    spoken = [of.vectors.cosine.pruned for of in pruner.report.languages.values()]
    assert len(spoken) == 30 and 0 < min(spoken) < max(spoken) <= 1
    text = str(pruner.report)
    assert "neighbours kept" in text and "Verdict: " in text
    pruner.save(small, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| neighbours kept |" in card and "**Verdict: " in card and "--speed" not in card
    # The text is what decides: sentences in the same tokens have the same vector.
    keep, same = pruner.plan.keep[-1, "vocab"], []
    for line in ("Is it so?", "Über Öl ærgo", "12 + 5", "The sum of both is given."):
        dense_ids, small_ids = (each(line)["input_ids"] for each in (reader, pruner.tokenizer))
        vectors = [embed(one, [torch.tensor(of)]) for one, of in ((model, dense_ids), (small, small_ids))]
        same.append([keep[number] for number in small_ids] == dense_ids)
        assert (float(torch.cosine_similarity(*vectors)) > 1 - 1e-5) == same[-1]
    assert {*same} == {True, False}


def test_the_figures_are_those_of_the_two_models_as_they_are():
    pruner, small, model, reader = pruned(widths={"vocab": 300, "mlp": 24}, languages=["de"])
    texts = {"greetings": ["Good morning to all of you!", "Guten Morgen!", "See you later, alligator."]}
    for tokens_go in (True, False):
        measured = Embeddings(model, texts, reader, tokens_go)
        assert measured.figures(model)[0]["greetings"].cosine.pruned == pytest.approx(1)
        measured.set_tokenizer(pruner.tokenizer, small)
        by_domain, by_language = measured.figures(small)
        assert 0 < by_domain["greetings"].cosine.pruned < 0.9999
        for code, figures in by_language.items():
            expected = pruner.report.languages[code].vectors.cosine.pruned
            assert figures.cosine.pruned == pytest.approx(expected)
        assert len(by_language) == 30 * tokens_go
    assert pruner.report.languages["de"].wanted and "Wanted languages (tokens): German" in str(pruner.report)
    assert pruned(widths={"mlp": 24}, languages=["de"])[0].report.languages["de"].vectors.cosine.pruned < 1


@given(st.lists(st.text("ab .!?\n。é", max_size=600), max_size=5))
def test_sentences_are_parts_of_the_text_each_once(texts):
    found, numbers = sentences(texts)
    assert len(found) == len({*found}) == len(numbers) <= MOST_SENTENCES and numbers == sorted(numbers)
    for part in found:
        assert 20 <= len(part.encode()) and len(part) <= 200
        assert any("".join(part.split()) in "".join(text.split()) for text in texts)


def test_many_sentences_are_of_as_many_documents_as_there_are():
    every = [f"This is sentence number {n}." for n in range(1000)]
    assert len({*sentences(every).documents}) == len({*sentences([*every, " ".join(every)]).texts}) == MOST_SENTENCES
    of_ten = sentences([" ".join(every[n : n + 100]) for n in range(0, 1000, 100)])
    assert {*Counter(of_ten.documents).values()} == {12, 13}
    # Of one document, runs of sentences are taken for documents.
    assert {*Counter(sentences([" ".join(every)]).documents).values()} == {8}
    found = sentences(["Heute regnet es stark. Morgen vielleicht nicht."]).texts
    assert sorted(found) == ["Heute regnet es stark.", "Morgen vielleicht nicht."]


def random_vectors(texts, channels=16, seed=0):
    return torch.randn(texts, channels, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("mode", ["mean", "cls", "max", "lasttoken", "weightedmean", ("cls", "mean")])
def test_vectors_are_those_of_sentence_transformers(mode, tmp_path):
    library = pytest.importorskip("sentence_transformers", minversion="6", reason="it makes the vectors to compare")
    modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
    save_with_tokenizer(build("bert"), tmp_path / "plain")
    pooling = modules.Pooling(32, pooling_mode=mode)
    theirs = library.SentenceTransformer(modules=[modules.Transformer(str(tmp_path / "plain")), pooling], device="cpu")
    theirs.save(str(tmp_path / "folder"))
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "folder").train()
    texts = [text[: 20 + 4 * number] for number, text in enumerate(documents(9))]
    rows = [torch.tensor(row) for row in tokenizer()(texts)["input_ids"]]
    ours = embed(model, rows, Pooling.of(model))
    assert model.training and len({len(row) for row in rows}) > 1
    expected = torch.tensor(theirs.encode(texts))  # of which a mean may be the sum here
    torch.testing.assert_close(normalize(ours), normalize(expected), atol=1e-5, rtol=1e-4)


def test_a_folder_without_pooling_takes_the_mean(tmp_path):
    build("bert").save_pretrained(tmp_path)
    assert Pooling.of(AutoModelForMaskedLM.from_pretrained(tmp_path)) == Pooling(("mean",))
    for modules in ("{", '[{"path": "1_SpladePooling", "type": "a.SpladePooling"}]'):
        put_into(tmp_path, {"modules.json": modules, "1_SpladePooling/config.json": '{"pooling_strategy": "max"}'})
        assert Pooling.of(AutoModelForMaskedLM.from_pretrained(tmp_path)) == Pooling(("mean",))


PROMPTED = {"prompts": {"query": "find: ", "document": "text of: "}, "default_prompt_name": None}


@pytest.mark.parametrize(
    ("default", "expected"), [(None, "text of: "), ("query", "find: "), ("other", "text of: ")], ids=str
)
def test_vectors_are_made_behind_the_prompt_of_the_model(default, expected, tmp_path):
    model = build("bert")
    model.save_pretrained(tmp_path)
    modules = [{"path": "", "type": "a.Transformer"}, {"path": "1_Pooling", "type": "a.Pooling"}]
    put_into(tmp_path, {"modules.json": json.dumps(modules)})
    put_into(tmp_path, {"1_Pooling/config.json": json.dumps({"pooling_mode": "mean", "include_prompt": False})})
    put_into(tmp_path, {PROMPTS: json.dumps({**PROMPTED, "default_prompt_name": default})})
    model = AutoModelForMaskedLM.from_pretrained(tmp_path)
    pooling = Pooling.of(model)
    assert pooling == (["mean"], expected, False)

    texts, reader = documents(3), tokenizer()
    measured = Embeddings(model, {"a": texts}, reader, languages=False)
    start = pooling.prompt_tokens(reader)
    for text, vector in zip(texts, measured.dense[0]["a"], strict=True):
        ids = reader(expected + text, return_tensors="pt")["input_ids"]
        assert (
            0 < start < ids.shape[1]
            and reader.decode(ids[0, :start]).strip() == reader.decode(reader(expected)["input_ids"][:start]).strip()
        )
        states = model.base_model(ids)[0][0, start:]
        torch.testing.assert_close(vector, states.mean(0))
    assert Pooling.of(build("bert")).prompt == ""


def test_an_encoder_decoder_has_the_vector_of_its_decoder():
    for case in ("t5", "bart"):
        model, ids = build(case), torch.arange(3, 9)
        (vector,) = embed(model, [ids])
        output = model(input_ids=ids[None], decoder_input_ids=ids[None], output_hidden_states=True)
        torch.testing.assert_close(vector, output.decoder_hidden_states[-1][0].mean(0))


def test_the_same_vectors_lose_nothing_and_others_what_is_counted():
    dense, others = random_vectors(30), random_vectors(20, seed=1)
    same = embedding_figures(3 * dense, dense, others, others)
    assert same["texts"] == 30 and same["neighbours"] == 1 and same["cosine"] == pytest.approx(1)
    assert same["cosine_margin"] == pytest.approx(COSINE_UNSEEN / 30)  # other sentences may lose some
    few = embedding_figures(dense[:20], dense[:20], others[:0], others[:0])
    assert "neighbours" not in few and few["cosine"] == pytest.approx(1)
    fewer_channels = embedding_figures(dense[:, :8], dense, others[:0, :8], others[:0])
    assert "cosine" not in fewer_channels and 0 < fewer_channels["neighbours"] < 1
    vectors = dense.clone()
    vectors[0] = -vectors[0]
    figures = embedding_figures(vectors, dense, others, others)
    assert figures["cosine"] == pytest.approx(28 / 30) and figures["cosine_worst"] == pytest.approx(-1)
    assert figures["cosine_p5"] == pytest.approx(1) and figures["cosine_margin"] > 2 / 30
    assert 0.5 < figures["neighbours"] < 1
    unrelated = embedding_figures(random_vectors(500, seed=2), random_vectors(500, seed=3), others[:0], others[:0])
    assert unrelated["neighbours"] == pytest.approx(NUM_NEIGHBOURS / 499, abs=4 * unrelated["neighbours_margin"])


def test_neighbours_are_the_nearest_of_all_but_the_document_of_the_text():
    vectors, others = random_vectors(12), random_vectors(9, seed=1)
    documents, every = torch.arange(12) // 2, torch.cat([vectors, others])
    near = nearness(vectors, others, documents)
    assert kept_share(near, near) == 1
    for number, row in enumerate(near.topk(NUM_NEIGHBOURS).indices.tolist()):
        cosines = torch.cosine_similarity(vectors[number][None], every)
        cosines[:12][documents == documents[number]] = -2
        assert row == cosines.argsort(descending=True)[:NUM_NEIGHBOURS].tolist()


def test_the_margin_that_a_run_states_covers_text_of_many_documents():
    """Sentences of a document are alike, and so is what they lose: few documents say little, and state so."""
    chance = torch.Generator().manual_seed(0)

    def vectors(documents, each):
        centre, loss = (torch.randn(documents, 32, generator=chance).repeat_interleave(each, 0) for _ in range(2))
        dense = centre + torch.randn(documents * each, 32, generator=chance)
        how_much = torch.rand(documents, 1, generator=chance).repeat_interleave(each, 0)
        return dense + how_much * loss, dense, torch.arange(documents).repeat_interleave(each)

    def figures(documents, each):
        pruned, dense, numbers = vectors(documents, each)
        return embedding_figures(pruned, dense, dense[:0], dense[:0], numbers.tolist())

    many = [figures(128, 1) for _ in range(20)]
    for number in (16, 32, 128):
        runs = [figures(number, 128 // number) for _ in range(100)]
        for name in ("cosine", "neighbours"):
            truth = sum(of[name] for of in many) / len(many)
            assert sum(abs(of[name] - truth) <= of[f"{name}_margin"] for of in runs) >= 85, (name, number)


def test_each_of_a_pair_looks_for_the_other():
    vectors = random_vectors(6)
    assert retrieved(vectors, 2 * vectors).tolist() == [1] * 6
    assert retrieved(vectors, vectors[[1, 0, 2, 3, 4, 5]]).tolist() == [0, 0, 1, 1, 1, 1]
