"""A model and a tokenizer with other tokens are refused wherever the two are combined."""

from copy import deepcopy
from math import inf

import pytest
import torch
from helpers import error_line, recovery_config, save_with_tokenizer, unread, with_tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from models import VOCAB, build, config, documents, real_text_model, tokenizer
from tokenizers import Tokenizer
from tokenizers.models import Unigram, WordLevel
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from optimum_structprune import DomainConfig, StructPruner, evaluate, export_gguf, prune_model, recover
from optimum_structprune.commands.cli import main
from optimum_structprune.domains.manifest import check_tokens, has_files, remember_text, tokenizer_of
from optimum_structprune.domains.packing import check_reads_any_text
from optimum_structprune.evaluation.heldout import read_heldout
from optimum_structprune.measure.text import Text
from optimum_structprune.system.errors import StructPruneError


# The special tokens first, and all words in the opposite order.
REVERSED_ORDER = [0, 1, 2] + list(range(VOCAB - 1, 2, -1))
REVERSED_MESSAGE = (
    "of 96 tokens, does not belong to this LlamaForCausalLM, which has 96 tokens and 96 rows. "
    "Different tokens: w95, w94, w93"
)
NUM_ROWS = 10


def reversed_tokenizer():
    """Return a tokenizer with the same words under other ids."""
    return with_tokens(build("llama-tied"), tokenizer(), REVERSED_ORDER)[1]


def word_tokenizer(vocabulary):
    """Return a tokenizer with these pairs of a token and its id."""
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(dict(vocabulary), unk_token="t0")))


def has_conflict(vocabulary, other_vocabulary):
    """Return whether a token has two ids, or an id with a row in the model has two tokens."""
    for token, number in vocabulary:
        for other_token, other_number in other_vocabulary:
            has_same_token = token == other_token
            has_same_id = number == other_number
            if has_same_token != has_same_id and other_number < NUM_ROWS:
                return True
    return False


TOKEN_PAIRS = st.tuples(st.sampled_from([f"t{number}" for number in range(8)]), st.sampled_from(range(12)))
VOCABULARIES = st.lists(TOKEN_PAIRS, min_size=1, unique_by=(lambda pair: pair[0], lambda pair: pair[1]))


@pytest.mark.slow
@settings(max_examples=200)
@given(
    own_vocabulary=VOCABULARIES,
    other_vocabulary=VOCABULARIES | st.just([]),
    change=st.sampled_from(["none", "less", "any"]),
)
def test_a_tokenizer_is_refused_if_an_id_has_another_token_or_no_row(own_vocabulary, other_vocabulary, change):
    model = build("llama-tied")
    model.resize_token_embeddings(NUM_ROWS)
    if change == "none":
        other_vocabulary = own_vocabulary
    elif change == "less":
        other_vocabulary = own_vocabulary[: len(other_vocabulary)]
    if not other_vocabulary:
        other_vocabulary = own_vocabulary
    remember_text(model, word_tokenizer(own_vocabulary))

    own_ids = {number for _, number in own_vocabulary}
    rowless_ids = {number for _, number in other_vocabulary if number >= NUM_ROWS}
    if has_conflict(own_vocabulary, other_vocabulary) or rowless_ids - own_ids:
        with pytest.raises(StructPruneError, match="does not belong to this LlamaForCausalLM"):
            check_tokens(model, word_tokenizer(other_vocabulary))
    else:
        check_tokens(model, word_tokenizer(other_vocabulary))


UNREAD_DOMAINS = [DomainConfig("unread", unread())]
ENTRY_POINTS = {
    "prune": lambda model, tokenizer: prune_model(model, config(domains=UNREAD_DOMAINS), tokenizer),
    "evaluate": lambda model, tokenizer: evaluate(model, tokenizer, UNREAD_DOMAINS, seq_length=24),
    "original": lambda model, tokenizer: evaluate(
        build("llama-tied"), tokenizer, UNREAD_DOMAINS, original=model, seq_length=24
    ),
    "gguf": lambda model, tokenizer: export_gguf(model, "nowhere.gguf", tokenizer),
    "recover": lambda model, tokenizer: recover(model, tokenizer, recovery_config(domains=UNREAD_DOMAINS)),
}


@pytest.mark.parametrize("name", ENTRY_POINTS)
def test_a_tokenizer_with_other_ids_is_refused_before_text_is_read(tmp_path, name):
    save_with_tokenizer(build("llama-tied"), tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)

    with pytest.raises(StructPruneError, match=REVERSED_MESSAGE):
        ENTRY_POINTS[name](model, reversed_tokenizer())


@pytest.mark.parametrize("name", ["prune", "evaluate", "recover"])
def test_a_tokenizer_without_an_unknown_token_is_refused_before_text_is_read(name):
    words = [(f"w{number}", -1.0) for number in range(VOCAB)]
    limited_tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(Unigram(words)))

    with pytest.raises(StructPruneError, match="no unknown token: .* Set `unk_id` in the `model` of"):
        ENTRY_POINTS[name](build("llama-tied"), limited_tokenizer)


def test_unigram_tokenizers_that_read_all_text_are_accepted():
    pieces = [(character, -1.0) for character in ByteLevel.alphabet()]
    byte_level = Tokenizer(Unigram(pieces))
    byte_level.pre_tokenizer = ByteLevel()
    with_unknown = Tokenizer(Unigram(pieces, unk_id=0))

    for backend in (byte_level, with_unknown):
        check_reads_any_text(PreTrainedTokenizerFast(tokenizer_object=backend))


def test_models_of_a_run_keep_the_tokenizer_of_the_run():
    model = build("llama-tied")
    pruned = prune_model(model, config(), tokenizer())
    copied = deepcopy(pruned)
    recovered = recover(pruned, tokenizer(), recovery_config(tokens=96))

    for result in (model, copied, recovered):
        with pytest.raises(StructPruneError, match=REVERSED_MESSAGE):
            evaluate(result, reversed_tokenizer(), UNREAD_DOMAINS, seq_length=24)


def test_the_tokenizer_in_the_folder_of_a_model_belongs_to_it_until_it_is_resized(tmp_path):
    save_with_tokenizer(build("llama-tied"), tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    evaluate(model, AutoTokenizer.from_pretrained(tmp_path), config().domains, seq_length=24, num_samples=2)

    # The saved tokenizer lacks the four new tokens.
    model.resize_token_embeddings(100)

    assert tokenizer_of(model) is None
    assert tokenizer_of(deepcopy(model)) is None


def test_a_tokenizer_that_transformers_creates_for_a_model_is_not_its_own(tmp_path):
    build("gpt2-tied").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)

    assert len(AutoTokenizer.from_pretrained(tmp_path)) == 1
    assert tokenizer_of(model) is None


@pytest.mark.parametrize("case", ["t5", "deberta-v2", "bert", "gpt2-tied"])
def test_a_tokenizer_without_files_is_not_used(case, tmp_path, capsys):
    folder = tmp_path / "bare"
    model = build(case)
    model.save_pretrained(folder)
    created = AutoTokenizer.from_pretrained(folder)

    assert not has_files(created)
    check_tokens(type(model).from_pretrained(folder), tokenizer())

    command = ["prune", str(folder), str(tmp_path / "out"), "--width", "mlp=24", "--seq-length", "24"]
    assert main(command) == 2
    assert "the folder has no tokenizer files" in error_line(capsys)

    created.save_pretrained(folder)
    assert has_files(AutoTokenizer.from_pretrained(folder))


def test_save_refuses_a_tokenizer_with_other_tokens_and_writes_nothing(tmp_path):
    model = build("llama-tied")
    model.resize_token_embeddings(100)
    pruner = StructPruner(config())
    pruned = pruner.prune_model(model, tokenizer())

    # The model has rows for four more tokens.
    extended = tokenizer()
    extended.add_tokens(["<a>", "<b>"])
    too_long = tokenizer()
    too_long.add_tokens([f"<{number}>" for number in range(5)])

    for refused, message in (
        (reversed_tokenizer(), ""),
        (word_tokenizer({"t0": 5}), ""),
        (too_long, ".*resize_token_embeddings"),
    ):
        with pytest.raises(StructPruneError, match=f"does not belong to this LlamaForCausalLM{message}"):
            pruner.save(pruned, tmp_path / "out", refused)
    assert list(tmp_path.iterdir()) == []

    for number, accepted in enumerate((tokenizer(), extended, None)):
        pruner.save(pruned, tmp_path / str(number), accepted)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "1")) == 98


# --- samples as text, in the same tokenizer and in another one
MODEL, TOKENIZER = real_text_model()
TEXTS = ["Ann has 3 apples and  5 pears,\n\twhich cost 12 $ each. " * 4, "Then she eats one of them. " * 6] * 2


def read_samples(tokenizer, texts, seq_length=40, num_samples=6):
    """Return the samples of texts."""
    return read_heldout(DomainConfig("a", texts), tokenizer, seq_length, num_samples).samples


def test_the_same_tokenizer_reads_the_same_tokens():
    for model, own_tokenizer, texts in (
        (MODEL, TOKENIZER, TEXTS),
        (build("llama-tied"), tokenizer(), documents(20)),
    ):
        samples = read_samples(own_tokenizer, texts)

        text = Text.of(samples, own_tokenizer).for_tokenizer(own_tokenizer, model)

        assert torch.stack(text.rows).equal(samples)
        assert text.tokens.tolist() == [39] * len(samples)


def test_an_incomplete_character_is_left_out():
    text = "日本語とé" * 20
    samples = read_samples(TOKENIZER, [text], seq_length=12)

    original = Text.of(samples, TOKENIZER)

    assert len(samples) > 2
    assert all(piece in text for (piece,) in original.strings)
    complete_texts = [TOKENIZER.decode(row[1:], errors="ignore").replace("\ufffd", "") for row in samples]
    assert original.bytes == sum(len(complete_text.encode()) for complete_text in complete_texts)
    assert any(len(row) < 12 for row in original.for_tokenizer(TOKENIZER, MODEL).rows)


def test_documents_in_another_tokenizer_are_separated_by_eos():
    samples = read_samples(TOKENIZER, TEXTS, seq_length=120)
    small_model, small_tokenizer = with_tokens(MODEL, TOKENIZER, list(range(300)))
    original = Text.of(samples, TOKENIZER)

    rows = original.for_tokenizer(small_tokenizer, small_model).rows

    for row, sample, texts in zip(rows, samples, original.strings, strict=True):
        assert row[0] == small_tokenizer.bos_token_id
        assert len(row) > len(sample)
        assert (row == small_tokenizer.eos_token_id).sum() == len(texts) - 1
        assert (sample == TOKENIZER.eos_token_id).sum() == len(texts) - 1
        assert small_tokenizer.decode(row[1:]) == TOKENIZER.decode(sample[1:])


@pytest.mark.parametrize("reader", [None, TOKENIZER])
def test_text_is_cut_to_the_positions_of_a_model(reader):
    original = Text.of(read_samples(TOKENIZER, TEXTS), TOKENIZER)
    _, small_tokenizer = with_tokens(MODEL, TOKENIZER, list(range(300)))
    reader = reader and small_tokenizer

    assert original.cut(inf, reader) is original
    for positions in (150, 60, 30):
        text = original.cut(positions, reader)
        (length,) = {len(row) for row in text.rows}
        assert 2 <= length <= 40
        for row, original_row in zip(text.rows, original.rows, strict=True):
            assert torch.equal(row, original_row[:length])
        encoded = text.for_tokenizer(small_tokenizer, MODEL)
        assert max(len(row) for row in encoded.rows) <= positions

    with pytest.raises(StructPruneError, match="which are too few for text"):
        original.cut(1, reader)


def test_text_is_refused_without_a_first_token():
    original = Text.of(read_samples(TOKENIZER, TEXTS), TOKENIZER)
    _, bare_tokenizer = with_tokens(MODEL, TOKENIZER, list(range(300)))
    bare_tokenizer.bos_token = None
    bare_tokenizer.eos_token = None
    with pytest.raises(StructPruneError, match="neither a BOS nor an EOS token"):
        original.for_tokenizer(bare_tokenizer, MODEL)
