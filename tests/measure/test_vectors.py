"""A report of an encoder compares the vectors of sentences by the original and the pruned model."""

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
from optimum_structprune.measure.vectors import (
    COSINE_UNSEEN,
    MOST_SENTENCES,
    NUM_NEIGHBOURS,
    Embeddings,
    Pooling,
    Texts,
    embed,
    embedding_figures,
    inverse_cloze,
    kept_share,
    nearness,
    prompt_tokens,
    reciprocal_ranks,
    retrieval_figure,
    sentences,
)


def prune_encoder(**fields):
    """Return the pruner, the pruned model, the original model and its tokenizer."""
    sizes = PLAIN | {"vocab_size": 400, "max_position_embeddings": 256}
    model = random_model(AutoModelForMaskedLM, "bert", sizes)
    reader = real_text_model()[1]
    pruner = StructPruner(fewer_tokens(num_samples=64, **fields))
    return pruner, pruner.prune_model(model, reader), model, reader


@pytest.fixture(scope="module")
def trimmed():
    """Return the result of a run that keeps 300 tokens. Tests must not change it."""
    return prune_encoder(widths={"vocab": 300})


def test_removed_tokens_are_reported_as_a_loss(trimmed, tmp_path):
    pruner, small, _, _ = trimmed
    vectors = pruner.result.report.domains
    assert vectors.keys() == {"math", "prose"}
    for result in vectors.values():
        assert 0 < result.cosine.pruned < 0.9999
        assert result.cosine_worst.pruned <= result.cosine_p5.pruned <= result.cosine.pruned
        assert 0 < result.neighbours.pruned < 1
        assert 0 < result.retrieval.pruned <= 1
        assert result.retrieval.margin > 0

    cosines = [language.cosine.pruned for language in pruner.result.report.languages.values()]
    assert len(cosines) == 30
    assert 0 < min(cosines) < max(cosines) <= 1

    assert "neighbours kept" in str(pruner.result.report)
    assert "Verdict: " in str(pruner.result.report)

    pruner.save(small, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| neighbours kept |" in card
    assert "**Verdict: " in card
    assert "--speed" not in card


def test_sentences_with_the_same_tokens_keep_their_vectors(trimmed):
    pruner, small, model, reader = trimmed
    kept_tokens = pruner.result.plan.keep[-1, "vocab"]

    cases = set()
    for sentence in ("Is it so?", "Über Öl ærgo", "12 + 5", "The sum of both is given."):
        ids = reader(sentence)["input_ids"]
        small_ids = pruner.result.tokenizer(sentence)["input_ids"]
        has_same_tokens = [kept_tokens[number] for number in small_ids] == ids

        vector = embed(model, [torch.tensor(ids)])
        small_vector = embed(small, [torch.tensor(small_ids)])
        has_same_vector = float(torch.cosine_similarity(vector, small_vector)) > 1 - 1e-5
        assert has_same_vector == has_same_tokens
        cases.add(has_same_tokens)

    assert cases == {True, False}


def test_figures_compare_the_original_and_the_pruned_model():
    pruner, small, model, reader = prune_encoder(widths={"vocab": 300, "mlp": 24}, languages=["de"])
    texts = {"greetings": ["Good morning to all of you!", "Guten Morgen!", "See you later, alligator."]}

    for measures_languages, num_languages in ((True, 30), (False, 0)):
        embeddings = Embeddings(model, texts, reader, measures_languages)
        by_domain, _ = embeddings.figures(model)
        assert by_domain["greetings"].cosine.pruned == pytest.approx(1)

        embeddings.set_tokenizer(pruner.result.tokenizer, small)
        by_domain, by_language = embeddings.figures(small)
        assert 0 < by_domain["greetings"].cosine.pruned < 0.9999
        assert len(by_language) == num_languages
        for code, figures in by_language.items():
            expected = pruner.result.report.languages[code].cosine.pruned
            assert figures.cosine.pruned == pytest.approx(expected)

    assert pruner.result.report.languages["de"].wanted
    assert "Wanted languages (tokens): German" in str(pruner.result.report)


def test_a_wanted_language_is_measured_without_vocabulary_trimming():
    pruner, *_ = prune_encoder(widths={"mlp": 24}, languages=["de"])
    assert pruner.result.report.languages["de"].cosine.pruned < 1


@given(st.lists(st.text("ab .!?\n。é", max_size=600), max_size=5))
def test_sentences_are_parts_of_the_text_without_repetitions(texts):
    parts, numbers, _ = sentences(texts)
    assert len(parts) == len(set(parts))
    assert len(parts) == len(numbers)
    assert len(parts) <= MOST_SENTENCES
    assert numbers == sorted(numbers)

    text_without_spaces = ["".join(text.split()) for text in texts]
    for part in parts:
        assert len(part.encode()) >= 20
        assert len(part) <= 200
        part_without_spaces = "".join(part.split())
        assert any(part_without_spaces in text for text in text_without_spaces)


def test_sentences_are_balanced_across_documents():
    one_each = [f"This is sentence number {n}." for n in range(1000)]
    joined = " ".join(one_each)
    assert len(set(sentences(one_each).documents)) == MOST_SENTENCES
    assert len(set(sentences(one_each + [joined]).texts)) == MOST_SENTENCES

    ten_documents = [" ".join(one_each[start : start + 100]) for start in range(0, 1000, 100)]
    counts = Counter(sentences(ten_documents).documents)
    assert set(counts.values()) == {12, 13}

    # In a single document, each run of sentences counts as a document.
    counts = Counter(sentences([joined]).documents)
    assert set(counts.values()) == {8}


def test_a_document_is_divided_into_its_sentences():
    texts = sentences(["Heute regnet es stark. Morgen vielleicht nicht."]).texts
    assert sorted(texts) == ["Heute regnet es stark.", "Morgen vielleicht nicht."]


def random_vectors(texts, channels=16, seed=0):
    return torch.randn(texts, channels, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("mode", ["mean", "cls", "max", "lasttoken", "weightedmean", ("cls", "mean")])
def test_vectors_equal_the_vectors_of_sentence_transformers(mode, tmp_path):
    library = pytest.importorskip("sentence_transformers", minversion="6", reason="it makes the vectors to compare")
    modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
    save_with_tokenizer(build("bert"), tmp_path / "plain")
    transformer = modules.Transformer(str(tmp_path / "plain"))
    pooling = modules.Pooling(32, pooling_mode=mode)
    encoder = library.SentenceTransformer(modules=[transformer, pooling], device="cpu")
    encoder.save(str(tmp_path / "folder"))

    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "folder").train()
    texts = [text[: 20 + 4 * number] for number, text in enumerate(documents(9))]
    rows = [torch.tensor(row) for row in tokenizer()(texts)["input_ids"]]
    vectors = embed(model, rows, Pooling.of(model))
    assert model.training
    assert len({len(row) for row in rows}) > 1

    # The library may add tokens up instead of averaging them, so only the directions are compared.
    expected = torch.tensor(encoder.encode(texts))
    torch.testing.assert_close(normalize(vectors), normalize(expected), atol=1e-5, rtol=1e-4)


def test_a_folder_without_pooling_uses_the_mean(tmp_path):
    build("bert").save_pretrained(tmp_path)
    assert Pooling.of(AutoModelForMaskedLM.from_pretrained(tmp_path)) == Pooling(("mean",))

    for modules in ("{", '[{"path": "1_SpladePooling", "type": "a.SpladePooling"}]'):
        put_into(tmp_path, {"modules.json": modules, "1_SpladePooling/config.json": '{"pooling_strategy": "max"}'})
        assert Pooling.of(AutoModelForMaskedLM.from_pretrained(tmp_path)) == Pooling(("mean",))


@pytest.mark.parametrize(
    ("default", "expected"), [(None, "text of: "), ("query", "find: "), ("other", "text of: ")], ids=str
)
def test_vectors_are_computed_after_the_prompt_of_the_model(default, expected, tmp_path):
    build("bert").save_pretrained(tmp_path)
    modules = [{"path": "", "type": "a.Transformer"}, {"path": "1_Pooling", "type": "a.Pooling"}]
    settings = {"pooling_mode": "mean", "include_prompt": False}
    prompts = {"prompts": {"query": "find: ", "document": "text of: "}, "default_prompt_name": default}
    put_into(tmp_path, {"modules.json": json.dumps(modules)})
    put_into(tmp_path, {"1_Pooling/config.json": json.dumps(settings)})
    put_into(tmp_path, {PROMPTS: json.dumps(prompts)})

    model = AutoModelForMaskedLM.from_pretrained(tmp_path)
    pooling = Pooling.of(model)
    assert pooling[:3] == (["mean"], False, expected)

    reader = tokenizer()
    texts = documents(3)
    embeddings = Embeddings(model, {"a": texts}, reader, languages=False)
    start = prompt_tokens(pooling.prompt, reader)
    prompt = reader.decode(reader(expected)["input_ids"][:start]).strip()
    for text, vector in zip(texts, embeddings.original[0]["a"], strict=True):
        ids = reader(expected + text, return_tensors="pt")["input_ids"]
        assert 0 < start < ids.shape[1]
        assert reader.decode(ids[0, :start]).strip() == prompt
        states = model.base_model(ids)[0][0, start:]
        torch.testing.assert_close(vector, states.mean(0))


def with_prompts(folder, prompts, default):
    """Return a random encoder whose folder has these prompts."""
    build("bert").save_pretrained(folder)
    put_into(folder, {"modules.json": '[{"path": "", "type": "a.Transformer"}]'})
    put_into(folder, {PROMPTS: json.dumps({"prompts": prompts, "default_prompt_name": default})})
    return AutoModelForMaskedLM.from_pretrained(folder)


@pytest.mark.parametrize(("prompts", "default", "expected"), [
    ({"query": "find: ", "document": "text of: "}, None, ("find: ", "text of: ")),
    ({"query": "find: ", "passage": "text of: "}, "query", ("find: ", "text of: ")),
    ({"query": "find: "}, "query", ("find: ", "find: ")),
    ({"other": "a: "}, "other", ("a: ", "a: ")),
    ({"other": "a: "}, None, ("", "")),
], ids=str)  # fmt: skip
def test_queries_and_passages_have_the_prompts_of_their_kinds(prompts, default, expected, tmp_path):
    pooling = Pooling.of(with_prompts(tmp_path, prompts, default))
    assert (pooling.query_prompt, pooling.passage_prompt) == expected


def test_queries_are_read_after_the_prompt_for_queries(tmp_path):
    """With the prompts inside the texts, a model without prompts finds the same passages."""
    pairs = inverse_cloze(DOCUMENTS)
    model = with_prompts(tmp_path, {"query": "find: ", "document": "text of: "}, None)
    prompted = [("find: " + query, "text of: " + passage) for query, passage in pairs]
    figures = []
    for encoder, own_pairs in ((model, pairs), (build("bert"), prompted), (build("bert"), pairs)):
        embeddings = Embeddings(encoder, {"a": Texts(DOCUMENTS, range(40), own_pairs)}, tokenizer(), languages=False)
        figures.append(embeddings.figures(encoder)[0]["a"].retrieval.pruned)
    assert figures[0] == figures[1]
    assert figures[0] != figures[2]


def test_a_model_without_a_prompt_has_an_empty_one():
    assert Pooling.of(build("bert")).prompt == ""


def test_an_encoder_decoder_has_the_vector_of_its_decoder():
    ids = torch.arange(3, 9)
    for case in ("t5", "bart"):
        model = build(case)
        (vector,) = embed(model, [ids])

        output = model(input_ids=ids[None], decoder_input_ids=ids[None], output_hidden_states=True)
        torch.testing.assert_close(vector, output.decoder_hidden_states[-1][0].mean(0))


def test_scaled_vectors_lose_nothing():
    original = random_vectors(30)
    further = random_vectors(20, seed=1)
    figures = embedding_figures(3 * original, original, further, further)

    assert figures.texts == 30
    assert figures.neighbours.pruned == 1
    assert figures.cosine.pruned == pytest.approx(1)
    assert figures.cosine.margin == pytest.approx(COSINE_UNSEEN / 30)  # unseen sentences may lose something


def test_few_texts_have_no_neighbours():
    original = random_vectors(20)
    figures = embedding_figures(original, original, original[:0], original[:0])

    assert figures.neighbours is None
    assert figures.cosine.pruned == pytest.approx(1)


def test_vectors_with_fewer_channels_have_neighbours_but_no_cosine():
    original = random_vectors(30)
    figures = embedding_figures(original[:, :8], original, original[:0, :8], original[:0])

    assert figures.cosine is None
    assert 0 < figures.neighbours.pruned < 1


def test_a_reversed_vector_is_reported_as_a_loss():
    original = random_vectors(30)
    further = random_vectors(20, seed=1)
    vectors = original.clone()
    vectors[0] = -vectors[0]
    figures = embedding_figures(vectors, original, further, further)

    assert figures.cosine.pruned == pytest.approx(28 / 30)
    assert figures.cosine_worst.pruned == pytest.approx(-1)
    assert figures.cosine_p5.pruned == pytest.approx(1)
    assert figures.cosine.margin > 2 / 30
    assert 0.5 < figures.neighbours.pruned < 1


def test_unrelated_vectors_share_neighbours_by_chance_only():
    original = random_vectors(500, seed=3)
    figures = embedding_figures(random_vectors(500, seed=2), original, original[:0], original[:0])

    by_chance = NUM_NEIGHBOURS / 499
    assert figures.neighbours.pruned == pytest.approx(by_chance, abs=4 * figures.neighbours.margin)


def test_neighbours_are_the_nearest_vectors_outside_the_document_of_the_text():
    vectors = random_vectors(12)
    further = random_vectors(9, seed=1)
    numbers = torch.arange(12) // 2
    cosines = nearness(vectors, further, numbers)
    assert kept_share(cosines, cosines) == 1

    all_vectors = torch.cat([vectors, further])
    for text, neighbours in enumerate(cosines.topk(NUM_NEIGHBOURS).indices.tolist()):
        expected = torch.cosine_similarity(vectors[text][None], all_vectors)
        expected[:12][numbers == numbers[text]] = -2
        assert neighbours == expected.argsort(descending=True)[:NUM_NEIGHBOURS].tolist()


def figures_of_random_vectors(num_documents, texts_per_document, generator):
    """Return the figures of texts with random losses. Texts of a document are alike, and so are their losses."""

    def repeat(values):
        return values.repeat_interleave(texts_per_document, 0)

    centres = repeat(torch.randn(num_documents, 32, generator=generator))
    losses = repeat(torch.randn(num_documents, 32, generator=generator))
    original = centres + torch.randn(num_documents * texts_per_document, 32, generator=generator)
    amounts = repeat(torch.rand(num_documents, 1, generator=generator))
    numbers = repeat(torch.arange(num_documents)).tolist()
    return embedding_figures(original + amounts * losses, original, original[:0], original[:0], numbers)


@pytest.mark.slow
def test_the_margin_of_a_run_covers_text_of_many_documents():
    """The margin is wider if documents are few, because their texts are alike."""
    generator = torch.Generator().manual_seed(0)
    reference = [figures_of_random_vectors(128, 1, generator) for _ in range(20)]

    for num_documents in (16, 32, 128):
        texts_per_document = 128 // num_documents
        runs = [figures_of_random_vectors(num_documents, texts_per_document, generator) for _ in range(100)]
        for name in ("cosine", "neighbours"):
            mean = sum(getattr(result, name).pruned for result in reference) / len(reference)
            figures = [getattr(result, name) for result in runs]
            covered = sum(abs(figure.pruned - mean) <= figure.margin for figure in figures)
            assert covered >= 85, (num_documents, name)


LONG_DOCUMENTS = [text for text in documents(300, seed=5) if len(text) > 120]
DOCUMENTS = [f"{text[:60]}. {text[60:200]}." for text in LONG_DOCUMENTS[:40]]


def retrieval(documents, model, compared):
    """Return the retrieval of a model compared with another one on documents."""
    texts = {"a": Texts(documents, range(len(documents)), inverse_cloze(documents))}
    embeddings = Embeddings(compared, texts, tokenizer(), languages=False)
    return embeddings.figures(model)[0]["a"].retrieval


def test_the_same_model_finds_exactly_what_the_original_finds():
    figure = retrieval(DOCUMENTS, build("bert"), build("bert"))
    assert figure.ratio == 1
    assert 0 < figure.margin < 0.01


def test_the_order_of_documents_changes_no_retrieval():
    expected = retrieval(DOCUMENTS, build("bert", 1), build("bert"))
    shuffled = retrieval(DOCUMENTS[::-1] + DOCUMENTS[:5], build("bert", 1), build("bert"))
    assert shuffled == expected


def test_few_documents_have_no_retrieval():
    assert retrieval(DOCUMENTS[:4], build("bert"), build("bert")) is None
    assert retrieval(DOCUMENTS[:5], build("bert"), build("bert")) is not None


def test_the_passages_of_all_domains_are_candidates():
    halves = {"a": DOCUMENTS[:20], "b": DOCUMENTS[20:]}
    texts = {name: Texts(part, range(20), inverse_cloze(part)) for name, part in halves.items()}
    together = Embeddings(build("bert"), texts, tokenizer(), languages=False).figures(build("bert"))[0]
    for name, part in halves.items():
        assert together[name].retrieval.original <= retrieval(part, build("bert"), build("bert")).original
    assert together["a"].retrieval.original < retrieval(halves["a"], build("bert"), build("bert")).original


def test_random_vectors_are_found_by_chance():
    number = 400
    ranks = reciprocal_ranks(random_vectors(number), random_vectors(number, seed=1), torch.arange(number))
    by_chance = sum(1 / rank for rank in range(1, number + 1)) / number
    assert float(ranks.mean()) == pytest.approx(by_chance, rel=0.5)


def test_the_rank_is_the_number_of_passages_that_are_at_least_as_near():
    passages = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    queries = torch.tensor([[5.0, 1.0], [1.0, 0.0], [0.0, 3.0]])
    assert reciprocal_ranks(queries, passages, torch.tensor([0, 1, 2])).tolist() == [1, 1 / 3, 1 / 2]


@pytest.mark.parametrize("value", [1.0, torch.nan])
def test_a_model_with_one_vector_for_all_texts_finds_nothing(value):
    vectors = torch.full((50, 8), value)
    assert reciprocal_ranks(vectors, vectors, torch.arange(50)).tolist() == [1 / 50] * 50


def retrieval_of_random_ranks(documents, generator):
    """Return the retrieval of a model that loses a tenth of its reciprocal ranks on average."""
    original = 1 / torch.randint(1, 6, (documents,), generator=generator).double()
    return retrieval_figure(original * (0.8 + 0.2 * torch.rand(documents, generator=generator)), original)


def test_the_margin_shrinks_with_documents_and_covers_the_loss():
    generator = torch.Generator().manual_seed(0)
    margins = []
    for number in (8, 32, 128, 512):
        figures = [retrieval_of_random_ranks(number, generator) for _ in range(200)]
        margins.append(sum(figure.margin for figure in figures) / len(figures))
        assert sum(abs(figure.ratio - 0.9) <= figure.margin for figure in figures) >= 170
    assert margins == sorted(margins, reverse=True)
    assert margins[-1] < margins[0] / 4


@given(st.lists(st.text("abcdefgh .!?\n。é", max_size=600), max_size=9))
def test_a_query_is_not_a_part_of_its_passage(texts):
    pairs = inverse_cloze(texts)
    queries = [query for query, _ in pairs]
    assert len(set(queries)) == len(queries) <= min(len(texts), MOST_SENTENCES)

    text_without_spaces = ["".join(text.split()) for text in texts]
    for query, passage in pairs:
        assert query not in passage
        assert min(len(query.encode()), len(passage.encode())) >= 20
        assert any("".join(query.split()) in text for text in text_without_spaces)


@pytest.mark.parametrize(("document", "query", "passage"), [
    ("The mill is at the edge of the town. It is old. It has a wheel.", "The mill is at the edge of the town.",
     "It is old. It has a wheel."),
    ("1.\nThe mill of the town\nIt was built in 1720.", "The mill of the town", "It was built in 1720."),
    ("the mill at the edge of the town has a wheel of oak", "the mill at the edge of", "the town has a wheel of oak"),
])  # fmt: skip
def test_the_first_sentence_of_a_document_finds_the_rest(document, query, passage):
    assert inverse_cloze([document]) == [(query, passage)]
