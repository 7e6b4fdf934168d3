"""Vocabulary trimming keeps the most valuable tokens with their parts, and measures the cost of text by language."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import GROUPED, config, random_model, real_text_model
from transformers import AutoModelForCausalLM

from optimum_structprune import DomainConfig
from optimum_structprune.arch.load import ModelInfo
from optimum_structprune.config.pruning import LANGUAGES
from optimum_structprune.domains.languages import CHOOSING, script, texts, tokens_by_language
from optimum_structprune.domains.manifest import COUNTED
from optimum_structprune.domains.packing import Domain, document_hash
from optimum_structprune.measure.languages import (
    cost_by_language,
    costs_before,
    known_languages,
    measured_texts,
    with_costs_after,
)
from optimum_structprune.method.resize import drop_tokens_
from optimum_structprune.vocabulary import choose, count
from optimum_structprune.vocabulary.choose import VocabularyRequest, token_shares
from optimum_structprune.vocabulary.count import language_shares, note_missing_words, text_shares
from optimum_structprune.vocabulary.tokens import Vocabulary, with_dependencies


MODEL, READER = real_text_model()


class Words:
    """A vocabulary of four letters, and of words that merges form from the letters."""

    tokenizer = None  # The samples are token ids already.

    def __init__(self, words, required):
        self.names = words.split()
        self.required = required
        self.letters = (0, 1, 2, 3)
        self.size = len(self.names)

    def dependencies(self, token):
        name = self.names[token]
        if len(name) == 1:
            return ()
        return [self.names.index(name[:-1]), self.names.index(name[-1])]

    def prior(self, token):
        return 1 / (1 + token)

    def surface(self, token):
        return self.names[token]


def request_of(vocabulary, extra_tokens=(), pruning_config=None):
    """Return a request that requires the tokens of the vocabulary, extra tokens, and the parts of all these tokens."""
    tokens = set(vocabulary.required).union(extra_tokens)
    required = with_dependencies(tokens, vocabulary.dependencies)
    return VocabularyRequest(pruning_config, vocabulary, vocabulary.size, frozenset(required), None)


def names_of_kept_tokens(vocabulary, counts, number):
    """Return the names of the `number` tokens that a vocabulary keeps, given the count of each token."""
    request = request_of(vocabulary)
    order = request.order(torch.tensor(counts) * 1.0)
    return " ".join(vocabulary.names[token] for token in request.keep(order, number))


WORDS = Words("a b c д ab abc abca ca дa", (0, 1, 2, 3))


def test_rare_tokens_are_removed_first_and_the_last_of_equally_rare_tokens():
    counts = [9, 9, 9, 0, 5, 3, 2, 1, 0]
    assert names_of_kept_tokens(WORDS, counts, 8) == "a b c д ab abc abca ca"
    assert names_of_kept_tokens(WORDS, counts, 7) == "a b c д ab abc abca"
    assert names_of_kept_tokens(WORDS, counts, 5) == "a b c д ab"

    letters = Words("a b c d", (0,))
    assert names_of_kept_tokens(letters, [1, 1, 1, 1], 2) == "a b"


@settings(max_examples=50)
@given(scores=st.lists(st.floats(0, 1), min_size=9, max_size=9), number=st.integers(7, 9), token=st.integers(0, 8))
def test_all_parts_of_kept_tokens_are_kept_wherever_the_order_is_cut(scores, number, token):
    request = request_of(WORDS, extra_tokens=[token])
    keep = request.keep(request.order(torch.tensor(scores)), number)

    assert len(keep) == number
    assert set(keep).issuperset(WORDS.required)
    assert token in keep
    assert all(set(WORDS.dependencies(kept_token)).issubset(keep) for kept_token in keep)


def domain_of_text(name, text, weight=1.0):
    ids = torch.tensor([[WORDS.names.index(word) for word in text.split()]])
    return Domain(name, weight, ids, ids)


def test_general_text_and_the_prior_count_only_in_the_scripts_of_the_named_domains():
    domains = [domain_of_text("named", "a ab", 0.75), domain_of_text("general", "дa c ab b", 0.25)]
    pruning_config = config(domains=[DomainConfig("named", "builtin:math")])
    request = request_of(WORDS, pruning_config=pruning_config)

    shares, entries = token_shares(request, domains, ())

    text_by_name = dict.fromkeys(WORDS.names, 0.0)
    text_by_name.update(a=0.375, ab=0.4375, b=0.0625, c=0.0625)
    assert shares.letters.tolist() == [1, 1, 1, 0, 0, 0, 0, 0, 0]
    assert dict(zip(WORDS.names, shares.text.tolist(), strict=True)) == text_by_name
    assert [entry.use for entry in entries] == [COUNTED, COUNTED]
    assert not shares.languages.any()

    prior = shares.prior
    assert prior[8] == 0 < prior[3]
    assert prior.sum() - prior[3] == pytest.approx(choose.PRIOR_WEIGHT)
    assert prior[3] < min(prior[:3])
    assert prior[:3].tolist() == sorted(prior[:3], reverse=True)

    # Predictions of the model count in the same scripts. The model may have fewer rows than the tokenizer has tokens.
    predictions = torch.tensor([0, 0, 0, 0.5, 0, 0.5, 0, 0]).double()
    shares_with_predictions, _ = token_shares(request, domains, (), predictions)
    difference = shares_with_predictions.prior - prior
    weighted = choose.EXPECTED_WEIGHT * torch.tensor([0, 0, 0, 0, 0, 0.5, 0, 0, 0]).double()
    torch.testing.assert_close(difference, weighted)


def frequencies(ids):
    """Return the share of each token of the reader in a text."""
    return torch.bincount(torch.tensor(ids), minlength=len(READER)).double() / len(ids)


def test_all_documents_of_a_text_count_except_the_excluded_ones():
    documents = ["one two", "three", "three", "four five six"]
    ids = torch.tensor([[0, 1]])
    domain = Domain("a", 1.0, ids, ids, origin=DomainConfig("a", source=documents))
    excluded = {document_hash("one two")}

    shares, entry = text_shares(domain, 0, READER, len(READER), excluded, 10**6)

    counted_ids = []
    for document in documents[1:]:
        counted_ids += READER(document)["input_ids"]
    torch.testing.assert_close(shares, frequencies(counted_ids))
    assert entry.calibration_tokens == len(counted_ids)
    assert set(entry.documents) == {document_hash(document) for document in documents[1:]}

    _, entry_of_one_token = text_shares(domain, 0, READER, len(READER), excluded, 1)
    assert len(entry_of_one_token.documents) == 1


def test_words_of_a_language_count_by_their_frequency():
    size = len(READER)
    english = language_shares(["en"], READER, size)
    german = language_shares(["de"], READER, size)
    mixture = language_shares(["en", "de"], READER, size)

    torch.testing.assert_close(mixture, (english + german) / 2)
    assert mixture.sum() == pytest.approx(1)

    ids = READER.get_vocab()
    assert english[ids["Ġthe"]] > english[ids["Ġof"]] > 0
    assert english[ids["Ġthe"]] > german[ids["Ġthe"]]


def test_sample_sentences_replace_missing_lists_of_words_with_one_message(monkeypatch, caplog):
    monkeypatch.setattr(count, "find_spec", lambda name: None)
    count._lines.cache_clear()
    note_missing_words.cache_clear()

    for _ in range(2):
        note_missing_words()
    (message,) = caplog.messages
    assert "pip install 'optimum-structprune[languages]'" in message

    ids = READER(texts(CHOOSING)["de"], add_special_tokens=False)["input_ids"]
    torch.testing.assert_close(language_shares(["de"], READER, len(READER)), frequencies(ids))
    count._lines.cache_clear()


def test_every_language_of_a_config_has_two_different_texts():
    all_texts = texts()
    sample_texts = texts(CHOOSING)

    assert list(all_texts) == list(sample_texts) == list(LANGUAGES)
    assert set(all_texts.values()).isdisjoint(sample_texts.values())
    assert len({script(text) for text in all_texts.values()}) > 10


def test_text_costs_fewer_tokens_and_bits_in_a_language_that_the_model_knows():
    tokens = {code: len(ids) for code, ids in tokens_by_language(READER).items()}
    # The tokenizer of the tests is trained on English, and reads Tamil byte by byte.
    assert tokens["en"] < tokens["fi"] < tokens["ta"]

    # The Tamil text is longer than the context of the model.
    bits = cost_by_language(MODEL, READER, ["en", "de", "ta"], ["en", "de", "ta"])
    assert list(bits) == ["en", "de"]
    assert known_languages(bits) >= {"en"}
    assert known_languages({"en": 1.0, "de": 3.0}) == {"en"}

    bits_of_first_text = cost_by_language(MODEL, READER, ["en", "de"], ["en", "de"], tokens["en"] + 1)
    assert list(bits_of_first_text) == ["en"]

    context = MODEL.config.max_position_embeddings
    readable = {code for code, number in tokens.items() if number <= context}
    assert sum(tokens[code] for code in readable) > 4096
    assert costs_before(MODEL, READER, readable).keys() == readable

    assert cost_by_language(None, READER, ["en", "ta"], []) == {"en": tokens["en"], "ta": tokens["ta"]}


def test_a_language_that_is_not_kept_is_measured_on_the_beginning_of_its_text():
    measured = measured_texts(["de"])

    assert measured["de"] == texts()["de"]
    assert texts()["fi"].startswith(measured["fi"])
    assert 2 * len(measured["fi"]) < len(texts()["fi"])


def test_no_language_is_measured_if_the_model_has_few_positions():
    fields = GROUPED | {"vocab_size": len(READER), "max_position_embeddings": 16}
    model = random_model(AutoModelForCausalLM, "llama", fields)

    with pytest.warns(UserWarning, match="sample text of en has more tokens than the model has positions .16."):
        costs = costs_before(model, READER, ["en"])

    assert costs == {}
    assert with_costs_after(costs, model, READER) == {}


def test_the_script_of_a_token_is_the_script_of_its_first_letter():
    scripts = [script(text) for text in ("▁the", "123", " дом", "漢字", "é")]
    assert scripts == ["LATIN", "", "CYRILLIC", "CJK", "LATIN"]
    rare_scripts = [script(text) for text in ("\u093f", "१", "\u0301", "2nd", "♥")]
    assert rare_scripts == ["DEVANAGARI", "DEVANAGARI", "", "LATIN", ""]

    vocabulary = Vocabulary.of(READER)
    counts = choose.scripts_of(vocabulary, range(vocabulary.size))
    assert counts["LATIN"] > 26
    assert "" not in counts
    assert choose.scripts_of(vocabulary, [0]).total() <= 1


# The value of each field, made from two token ids and a number that is no id.
CONFIG_FIELDS = {
    "pad_token_id": lambda a, b, n: a,
    "image_token_index": lambda a, b, n: b,
}
GENERATION_FIELDS = {
    "eos_token_id": lambda a, b, n: [a, b],
    "suppress_tokens": lambda a, b, n: [b, a],
    "begin_suppress_tokens": lambda a, b, n: [a],
    "bad_words_ids": lambda a, b, n: [[a, b], [b]],
    "force_words_ids": lambda a, b, n: [[[a], [b]], [[b, a]]],
    "forced_decoder_ids": lambda a, b, n: [[n, a], [n + 1, b]],
    "lang_to_id": lambda a, b, n: {"<|de|>": a},
    "task_to_id": lambda a, b, n: {"translate": b},
    "sequence_bias": lambda a, b, n: [[[a, b], n], [[a], -n]],
    "no_repeat_ngram_size": lambda a, b, n: n,
    "exponential_decay_length_penalty": lambda a, b, n: (n, 1.5),
}
BIASES_BY_TUPLE = {"sequence_bias": lambda a, b, n: {(a, b): n, (b,): n}}


def set_fields(target, forms, a, b, number):
    """Set fields of a config to values of two ids and a number."""
    for name, form in forms.items():
        setattr(target, name, form(a, b, number))


def assert_fields(target, forms, a, b, number):
    """Check fields of a config against values of two ids and a number."""
    for name, form in forms.items():
        assert getattr(target, name) == form(a, b, number), name


def ids_up_to(last):
    """Return a strategy of ids that often draws one of the last 20."""
    return st.integers(1, last) | st.integers(last - 20, last)


@pytest.mark.slow
@settings(max_examples=30)
@given(
    data=st.data(),
    rows=st.sampled_from([390, 400, 464]),
    generation_fields=st.sampled_from([GENERATION_FIELDS, GENERATION_FIELDS | BIASES_BY_TUPLE]),
)
def test_every_id_in_a_config_keeps_its_row_and_name_and_other_numbers_do_not_change(data, rows, generation_fields):
    number = data.draw(ids_up_to(500))
    a = data.draw(ids_up_to(rows - 1))
    b = data.draw(ids_up_to(max(rows, 400) - 1))

    model = random_model(AutoModelForCausalLM, "llama", GROUPED | {"vocab_size": rows})
    original_weights = torch.randn(rows, model.config.hidden_size)
    model.get_input_embeddings().weight.data = original_weights.clone()
    set_fields(model.config, CONFIG_FIELDS, a, b, number)
    set_fields(model.generation_config, generation_fields, a, b, number)

    request = VocabularyRequest.of(config(widths={"vocab": rows}), ModelInfo.of(model), READER, {"vocab": rows})
    num_rows = data.draw(st.sampled_from(request.allowed))
    keep = request.keep(request.order(torch.rand(400)), num_rows)
    drop_tokens_(model, ModelInfo.of(model).arch, keep)

    smaller = request.vocabulary.smaller(keep)
    weights = model.get_input_embeddings().weight
    new_a = model.config.pad_token_id
    new_b = model.config.image_token_index
    for old_id, new_id in ((a, new_a), (b, new_b)):
        assert smaller.convert_ids_to_tokens(new_id) == READER.convert_ids_to_tokens(old_id)
        if old_id >= rows:
            assert new_id >= num_rows
        else:
            assert torch.equal(weights[new_id], original_weights[old_id])

    assert_fields(model.config, CONFIG_FIELDS, new_a, new_b, number)
    assert_fields(model.generation_config, generation_fields, new_a, new_b, number)
    assert model.config.vocab_size == len(weights) == num_rows
    assert len(smaller) >= min(num_rows, 400) - 2
