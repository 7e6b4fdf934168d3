"""Which tokens stay: those whose absence would cost most, and their parts; and what languages lose with the rest."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import GROUPED, config, random_model, real_text_model
from transformers import AutoModelForCausalLM

from optimum_structprune import DomainConfig
from optimum_structprune.arch.load import ModelInfo
from optimum_structprune.config.pruning import LANGUAGES
from optimum_structprune.domains.manifest import COUNTED
from optimum_structprune.domains.packing import Domain, document_hash
from optimum_structprune.steps.resize import drop_tokens_
from optimum_structprune.vocabulary import choose, count, languages
from optimum_structprune.vocabulary.choose import VocabularyRequest, wanted_shares
from optimum_structprune.vocabulary.count import language_shares, note_missing_words, text_shares
from optimum_structprune.vocabulary.languages import CHOOSING, cost_by_language, script, texts, tokens_by_language
from optimum_structprune.vocabulary.tokens import Vocabulary, with_dependencies


MODEL, READER = real_text_model()


class Words:
    """A vocabulary of letters, and of words that grow from them by merges."""

    tokenizer = None  # samples are counted as they are

    def __init__(self, words, required):
        self.names, self.required, self.letters = words.split(), required, (0, 1, 2, 3)
        self.size = len(self.names)

    def dependencies(self, token):
        name = self.names[token]
        return [self.names.index(part) for part in (name[:-1], name[-1])] if len(name) > 1 else ()

    def prior(self, token):
        return 1 / (1 + token)

    def surface(self, token):
        return self.names[token]


def request_of(vocabulary, always=(), asked=None):
    ids = with_dependencies({*vocabulary.required, *always}, vocabulary.dependencies)
    return VocabularyRequest(asked, vocabulary, vocabulary.size, frozenset(ids), None)


def kept(words, counts, number):
    request = request_of(words)
    return " ".join(words.names[token] for token in request.keep(request.order(torch.tensor(counts) * 1.0), number))


WORDS = Words("a b c д ab abc abca ca дa", (0, 1, 2, 3))


def test_rare_tokens_go_first_and_of_equal_ones_the_last():
    counts = [9, 9, 9, 0, 5, 3, 2, 1, 0]
    assert kept(WORDS, counts, 8) == "a b c д ab abc abca ca"
    assert kept(WORDS, counts, 7) == "a b c д ab abc abca"
    assert kept(WORDS, counts, 5) == "a b c д ab"
    assert kept(Words("a b c d", (0,)), [1, 1, 1, 1], 2) == "a b"


@settings(max_examples=50)
@given(scores=st.lists(st.floats(0, 1), min_size=9, max_size=9), number=st.integers(7, 9), always=st.integers(0, 8))
def test_wherever_the_order_is_cut_what_stays_can_be_formed(scores, number, always):
    request = request_of(WORDS, [always])
    keep = request.keep(request.order(torch.tensor(scores)), number)
    assert len(keep) == number and {*keep} >= {*WORDS.required, always}
    assert all({*WORDS.dependencies(token)} <= {*keep} for token in keep)


def of_text(name, text, weight=1.0):
    ids = torch.tensor([[WORDS.names.index(word) for word in text.split()]])
    return Domain(name, weight, ids, ids)


def test_general_text_and_the_prior_count_in_the_scripts_of_the_named_domains_alone():
    domains = [of_text("named", "a ab", 0.75), of_text("general", "дa c ab b", 0.25)]
    asked = config(domains=[DomainConfig("named", "builtin:math")])
    shares, entries = wanted_shares(request_of(WORDS, asked=asked), domains, ())
    assert shares.letters.tolist() == [1, 1, 1, 0, 0, 0, 0, 0, 0]
    assert dict(zip(WORDS.names, shares.text.tolist(), strict=True)) == {
        **dict.fromkeys(WORDS.names, 0.0), "a": 0.375, "ab": 0.4375, "b": 0.0625, "c": 0.0625
    }  # fmt: skip
    assert [entry.use for entry in entries] == [COUNTED] * 2 and not shares.languages.any()
    other = shares.prior
    assert other[8] == 0 < other[3] and other.sum() - other[3] == pytest.approx(choose.PRIOR_WEIGHT)
    assert other[3] < min(other[:3]) and other[:3].tolist() == sorted(other[:3], reverse=True)
    # What the model expects counts in the same scripts; the model may have fewer rows than the tokenizer has tokens.
    expected = torch.tensor([0, 0, 0, 0.5, 0, 0.5, 0, 0]).double()
    more = wanted_shares(request_of(WORDS, asked=asked), domains, (), expected)[0].prior - other
    torch.testing.assert_close(more, choose.EXPECTED_WEIGHT * torch.tensor([0, 0, 0, 0, 0, 0.5, 0, 0, 0]).double())


def shares_of(ids):
    return torch.bincount(torch.tensor(ids), minlength=len(READER)).double() / len(ids)


def test_all_text_counts_but_for_documents_that_are_set_aside():
    texts, ids = ["one two", "three", "three", "four five six"], torch.tensor([[0, 1]])
    domain = Domain("a", 1.0, ids, ids, origin=DomainConfig("a", source=texts))
    out = {document_hash(texts[0])}
    shares, entry = text_shares(domain, 0, READER, len(READER), out, 10**6)
    read = [token for text in texts[1:] for token in READER(text)["input_ids"]]
    torch.testing.assert_close(shares, shares_of(read))
    assert entry.calibration_tokens == len(read) and {*entry.documents} == {*map(document_hash, texts[1:])}
    assert len(text_shares(domain, 0, READER, len(READER), out, 1)[1].documents) == 1


def test_the_words_of_a_language_count_as_they_occur_by_their_frequency():
    both, english, german = (language_shares(codes, READER, len(READER)) for codes in (["en", "de"], ["en"], ["de"]))
    torch.testing.assert_close(both, (english + german) / 2)
    assert both.sum() == pytest.approx(1)
    of = READER.get_vocab()
    assert english[of["Ġthe"]] > english[of["Ġof"]] > 0 and english[of["Ġthe"]] > german[of["Ġthe"]]


def test_without_lists_of_words_sample_sentences_count_and_a_run_says_so(monkeypatch, caplog):
    monkeypatch.setattr(count, "find_spec", lambda name: None)
    count._lines.cache_clear()
    note_missing_words.cache_clear()
    for _ in range(2):
        note_missing_words()
    (said,) = caplog.messages
    assert "pip install 'optimum-structprune[languages]'" in said
    ids = READER(texts(CHOOSING)["de"], add_special_tokens=False)["input_ids"]
    torch.testing.assert_close(language_shares(["de"], READER, len(READER)), shares_of(ids))
    count._lines.cache_clear()


def test_every_language_that_a_config_may_name_has_both_texts_and_they_differ():
    same, choosing = texts(), texts(CHOOSING)
    assert [*same] == [*choosing] == [*LANGUAGES]
    assert not {*same.values()} & {*choosing.values()}
    assert len({script(text) for text in same.values()}) > 10


def test_the_same_text_takes_few_tokens_and_bits_where_a_model_knows_the_language():
    tokens = {code: len(ids) for code, ids in tokens_by_language(READER).items()}
    assert tokens["en"] < tokens["fi"] < tokens["ta"]  # the tests' tokenizer knows English, and Tamil byte by byte
    bits = cost_by_language(MODEL, READER, ["en", "de", "ta"])
    assert [*bits] == ["en", "de"]  # that in Tamil is longer than the model reads
    assert languages.known_languages(bits) >= {"en"} == languages.known_languages({"en": 1.0, "de": 3.0})
    assert [*cost_by_language(MODEL, READER, ["en", "de"], max_tokens=len(tokens_by_language(READER)["en"]) + 1)] == [
        "en"
    ]
    fit = {code for code, count in tokens.items() if count <= MODEL.config.max_position_embeddings}
    assert sum(tokens[code] for code in fit) > 4096 and languages.costs_before(MODEL, READER, fit).keys() == fit
    assert cost_by_language(None, READER, ["en", "ta"]) == {code: tokens[code] for code in ("en", "ta")}


def test_tokens_are_counted_by_their_script_that_of_the_first_letter():
    assert [script(text) for text in ("▁the", "123", " дом", "漢字", "é")] == ["LATIN", "", "CYRILLIC", "CJK", "LATIN"]
    assert [script(text) for text in ("\u093f", "१", "\u0301", "2nd", "♥")] == ["DEVANAGARI"] * 2 + ["", "LATIN", ""]
    vocabulary = Vocabulary.of(READER)
    everything = languages.scripts_of(vocabulary, range(vocabulary.size))
    assert everything["LATIN"] > 26 and "" not in everything
    assert languages.scripts_of(vocabulary, [0]).total() <= 1


# The value of a field of the config (the first two) or of the generation config, from two ids and another number.
FIELDS = {
    "pad_token_id": lambda a, b, n: a,
    "image_token_index": lambda a, b, n: b,
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
OF_BIASES = {"sequence_bias": lambda a, b, n: {(a, b): n, (b,): n}}


@pytest.mark.slow
@settings(max_examples=30)
@given(data=st.data(), rows=st.sampled_from([390, 400, 464]), fields=st.sampled_from([FIELDS, FIELDS | OF_BIASES]))
def test_every_id_that_a_config_names_keeps_its_row_and_its_name_and_no_other_number_changes(data, rows, fields):
    ids = [st.integers(1, last) | st.integers(last - 20, last) for last in (500, rows - 1, max(rows, 400) - 1)]
    number, a, b = map(data.draw, ids)
    model = random_model(AutoModelForCausalLM, "llama", {**GROUPED, "vocab_size": rows})
    dense = torch.randn(rows, model.config.hidden_size)
    model.get_input_embeddings().weight.data = dense.clone()
    for at, (name, form) in enumerate(fields.items()):
        setattr(model.config if at < 2 else model.generation_config, name, form(a, b, number))
    tokens = VocabularyRequest.of(config(widths={"vocab": rows}), ModelInfo.of(model), READER, {"vocab": rows})
    left = data.draw(st.sampled_from(tokens.allowed))
    keep = tokens.keep(tokens.order(torch.rand(400)), left)
    drop_tokens_(model, ModelInfo.of(model).arch, keep)
    smaller, weights = tokens.vocabulary.smaller(keep), model.get_input_embeddings().weight
    new = [getattr(model.config, name) for name in ("pad_token_id", "image_token_index")]
    for old, now in zip((a, b), new, strict=True):
        assert smaller.convert_ids_to_tokens(now) == READER.convert_ids_to_tokens(old)
        assert now >= left if old >= rows else torch.equal(weights[now], dense[old])
    for at, (name, form) in enumerate(fields.items()):
        assert getattr(model.config if at < 2 else model.generation_config, name) == form(*new, number), name
    assert model.config.vocab_size == len(weights) == left
    assert len(smaller) >= min(left, 400) - 2
