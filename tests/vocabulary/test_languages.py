"""What languages and scripts lose with a smaller vocabulary."""

from models import real_text_model

from optimum_structprune.vocabulary.languages import SENTENCES, script, scripts_of, tokens_per_word
from optimum_structprune.vocabulary.tokens import Vocabulary


def test_a_word_takes_at_least_a_token_in_each_of_30_languages():
    costs = tokens_per_word(real_text_model()[1])
    assert len(costs) == 30
    assert all(cost >= 1 for cost in costs.values())
    assert costs["en"] < costs["fi"] < costs["ta"]  # the tests' tokenizer knows English, and Tamil byte by byte


def test_sentences_are_sorted_and_have_words_that_are_counted():
    lines = [line.split(" ", 1) for line in SENTENCES.read_text("utf-8").splitlines()[1:]]
    codes = [code for code, _ in lines]
    assert codes == sorted(set(codes))
    assert all(len(text.split("|" if "|" in text else None)) >= 6 for _, text in lines)


def test_the_script_of_a_text_is_that_of_its_first_letter():
    assert [script(text) for text in ("▁the", "123", " дом", "漢字", "é")] == ["LATIN", "", "CYRILLIC", "CJK", "LATIN"]


def test_tokens_are_counted_by_their_script():
    vocabulary = Vocabulary.of(real_text_model()[1])
    everything = scripts_of(vocabulary, range(vocabulary.size))
    assert everything["LATIN"] > 26 and "" not in everything
    assert scripts_of(vocabulary, [0]).total() <= 1
