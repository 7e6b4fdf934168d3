"""Which tokens stay: those whose absence would cost most, and their parts; and what languages lose with the rest."""

from dataclasses import dataclass, field
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import GROUPED, config, random_model, real_text_model, token_ids
from transformers import AutoModelForCausalLM

from optimum_structprune import DomainConfig
from optimum_structprune.arch.load import ModelInfo
from optimum_structprune.config.pruning import LANGUAGES
from optimum_structprune.domains.load import given_domains
from optimum_structprune.domains.packing import Domain
from optimum_structprune.removals.resize import drop_tokens_
from optimum_structprune.vocabulary.choose import (
    VocabularyRequest,
    predicted_shares,
    removal_order,
    token_shares,
    wanted_shares,
)
from optimum_structprune.vocabulary.languages import (
    CHOOSING,
    cost_by_language,
    known,
    script,
    scripts_of,
    texts,
    tokens_by_language,
)
from optimum_structprune.vocabulary.tokens import Vocabulary


@dataclass
class Words:
    """A vocabulary of letters, and of words that grow from them by merges."""

    words: str
    always: tuple[int, ...] = ()
    names: list[str] = field(init=False)

    def __post_init__(self):
        self.names = self.words.split()

    @property
    def size(self):
        return len(self.names)

    def parts(self, token):
        name = self.names[token]
        return [self.names.index(part) for part in (name[:-1], name[-1])] if len(name) > 1 else ()

    needs = parts

    def surface(self, token):
        return self.names[token]


def chosen(vocabulary, shares, number, always=(), predicted=None):
    order = removal_order(vocabulary, shares, always, predicted)
    return tuple(sorted({*range(vocabulary.size)} - {*order[: vocabulary.size - number]}))


def kept(words, counts, number, always=(), predicted=None):
    predicted = None if predicted is None else torch.tensor(predicted) * 1.0
    keep = chosen(words, torch.tensor(counts) * 1.0, number, always, predicted)
    return " ".join(words.names[token] for token in keep)


WORDS = Words("a b c д ab abc abca ca дa", always=(0, 1, 2, 3))


def test_rare_tokens_go_first_and_those_of_scripts_that_the_text_never_shows_before_them():
    counts = [9, 9, 9, 0, 5, 3, 2, 1, 0]
    assert kept(WORDS, counts, 9) == WORDS.words
    assert kept(WORDS, counts, 8) == "a b c д ab abc abca ca"
    assert kept(WORDS, counts, 7) == "a b c д ab abc abca"
    assert kept(WORDS, counts, 5) == "a b c д ab"
    assert kept(Words("a b x ab", (0, 1)), [9, 9, 0, 0], 3) == "a b ab", "what is never read goes before all others"


def test_what_a_token_is_built_from_stays_and_takes_over_what_it_was_read_for():
    counts = [9, 9, 9, 0, 1, 1, 50, 3, 0]
    assert kept(WORDS, counts, 7) == "a b c д ab abc abca"
    # `abc` alone was read less often than `ca`, but it now also stands for `abca`.
    assert kept(Words("a b c ab abc abca ca", (0, 1, 2)), [9, 9, 9, 1, 1, 2, 2.5], 5) == "a b c ab abc"
    # Tokens of the user stay with their parts.
    assert kept(WORDS, [9, 9, 9, 0, 0, 0, 0, 5, 5], 7, always=[6]) == "a b c д ab abc abca"


def test_domains_count_by_their_weights_and_not_by_their_length():
    domains = given_domains({"long": torch.zeros(9, 4).long(), "short": torch.ones(5, 2).long()}, holdout=0.0)
    assert token_shares(domains, 3).tolist() == [0.5, 0.5, 0.0]


def test_a_token_stays_that_the_model_expects_and_one_of_equal_shares_that_takes_more_tokens_to_spell():
    counts = [9, 9, 9, 0, 5, 3, 0, 0, 0]
    assert kept(WORDS, counts, 7, predicted=[1, 1, 1, 1, 1, 1, 1, 0, 0]) == "a b c д ab abc abca"
    assert kept(WORDS, counts, 7, predicted=[1, 1, 1, 1, 1, 1, 0, 0, 1]) == "a b c д ab abc дa"
    names = Words("a b c abc ab ba", always=(0, 1, 2))
    names.parts = lambda token: [names.names.index(letter) for letter in names.names[token]] if token > 2 else ()
    names.needs = lambda token: ()
    assert kept(names, [1, 1, 1, 1, 1, 1], 4, predicted=[1] * 6) == "a b c abc"


def test_what_a_model_expects_adds_up_to_one_whatever_the_weights():
    model, domains = real_text_model()[0], given_domains({"one": token_ids(4, 9), "two": token_ids(4, 9)}, holdout=0.0)
    shares = predicted_shares(model, domains, model.config.vocab_size)
    assert shares.sum() == pytest.approx(1) and (shares > 0).all()


def test_general_text_counts_in_the_scripts_of_the_named_domains_alone():
    named, general = (torch.tensor([[WORDS.names.index(word) for word in of.split()]]) for of in ("a ab", "дa c ab b"))
    domains = [Domain("named", 0.75, named, named), Domain("general", 0.25, general, general)]
    shares, predicted = wanted_shares(
        None, config(domains=[DomainConfig("named", "builtin:math")]), domains, None, WORDS
    )
    assert predicted is None
    assert dict(zip(WORDS.names, shares.tolist(), strict=True)) == {
        **dict.fromkeys(WORDS.names, 0.0), "a": 0.375, "ab": 0.4375, "b": 0.0625, "c": 0.0625
    }  # fmt: skip


def test_a_tokenizer_is_left_with_what_is_chosen():
    vocabulary = Vocabulary.of(real_text_model()[1])
    number = (len(vocabulary.always) + vocabulary.size) // 2
    keep = chosen(vocabulary, torch.rand(vocabulary.size), number)
    assert len(vocabulary.smaller(keep)) == len(keep) == number


def test_every_language_that_a_config_may_name_has_both_texts_and_they_differ():
    same, choosing = texts(), texts(CHOOSING)
    assert [*same] == [*choosing] == [*LANGUAGES]
    assert not {*same.values()} & {*choosing.values()}
    assert len({script(text) for text in same.values()}) > 10


def test_the_same_text_takes_few_tokens_and_bits_where_a_model_knows_the_language():
    model, tokenizer = real_text_model()
    tokens = {code: len(ids) for code, ids in tokens_by_language(tokenizer).items()}
    assert tokens["en"] < tokens["fi"] < tokens["ta"]  # the tests' tokenizer knows English, and Tamil byte by byte
    bits = cost_by_language(model, tokenizer, True, ["en", "de", "ta"])
    assert [*bits] == ["en", "de"]  # that in Tamil is longer than the model reads
    assert known(bits) >= {"en"} == known({"en": 1.0, "de": 3.0})
    few = len(tokens_by_language(tokenizer)["en"]) + 1
    assert [*cost_by_language(model, tokenizer, True, ["en", "de"], most=few)] == ["en"]
    assert cost_by_language(model, tokenizer, False, ["en", "ta"]) == {code: tokens[code] for code in ("en", "ta")}


def test_tokens_are_counted_by_their_script_that_of_the_first_letter():
    assert [script(text) for text in ("▁the", "123", " дом", "漢字", "é")] == ["LATIN", "", "CYRILLIC", "CJK", "LATIN"]
    vocabulary = Vocabulary.of(real_text_model()[1])
    everything = scripts_of(vocabulary, range(vocabulary.size))
    assert everything["LATIN"] > 26 and "" not in everything
    assert scripts_of(vocabulary, [0]).total() <= 1


# The value of a field of the config (the first two) or of the generation config, from two ids and another number.
FIELDS = {
    "pad_token_id": lambda a, b, n: a,
    "image_token_index": lambda a, b, n: b,
    "eos_token_id": lambda a, b, n: [a, b],
    "decoder_start_token_id": lambda a, b, n: a,
    "suppress_tokens": lambda a, b, n: [b, a],
    "begin_suppress_tokens": lambda a, b, n: [a],
    "bad_words_ids": lambda a, b, n: [[a, b], [b]],
    "force_words_ids": lambda a, b, n: [[[a], [b]], [[b, a]]],
    "forced_decoder_ids": lambda a, b, n: [[n, a], [n + 1, b]],
    "sequence_bias": lambda a, b, n: [[[a, b], n], [[a], -n]],
    "no_repeat_ngram_size": lambda a, b, n: n,
    "max_length": lambda a, b, n: n,
    "exponential_decay_length_penalty": lambda a, b, n: (n, 1.5),
}
OF_BIASES = {"sequence_bias": lambda a, b, n: {(a, b): n, (b,): n}}


@cache
def reader():
    """A byte-level tokenizer of 400 tokens."""
    return real_text_model()[1]


@pytest.mark.long
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
    tokens = VocabularyRequest.of(config(widths={"vocab": rows}), ModelInfo.of(model), reader(), {"vocab": rows})
    left = data.draw(st.sampled_from(tokens.may))
    keep = tokens.keep(removal_order(tokens.vocabulary, torch.rand(400), tokens.always), left)
    drop_tokens_(model, ModelInfo.of(model).arch, keep)
    smaller, weights = tokens.vocabulary.smaller(keep), model.get_input_embeddings().weight
    new = [getattr(model.config, name) for name in ("pad_token_id", "image_token_index")]
    for old, now in zip((a, b), new, strict=True):
        assert smaller.convert_ids_to_tokens(now) == reader().convert_ids_to_tokens(old)
        assert now >= left if old >= rows else torch.equal(weights[now], dense[old])
    for at, (name, form) in enumerate(fields.items()):
        assert getattr(model.config if at < 2 else model.generation_config, name) == form(*new, number), name
    assert model.config.vocab_size == len(weights) == left
    assert len(smaller) >= min(left, 400) - 2
