"""A tokenizer of any kind without some of its tokens reads and writes the same text as before."""

import copy
import json
import random
from collections import Counter
from datetime import datetime
from functools import lru_cache
from math import log

import pytest
import torch
import transformers
from helpers import aligned_divergence, today_is
from hypothesis import given, settings
from hypothesis import strategies as st
from models import GROUPED, random_model
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import BertProcessing, TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from optimum_structprune import StructPruneError
from optimum_structprune.measure.kl import divergence
from optimum_structprune.measure.losses import measure, totals
from optimum_structprune.measure.text import Text
from optimum_structprune.vocabulary.token_alignment import TokenAlignment
from optimum_structprune.vocabulary.tokens import Vocabulary


TEXT = [
    "The cat sat on the mat, and the other cats sat on the other mats.",
    "Numbers such as 102, 345 and 6789 are there, there and everywhere; Ünïcödé and naïve cafés too.",
    "   Spaces,\ttabs and\n\nempty lines; 猫が座った。 Кошки сидели на коврике, и другие кошки тоже сидели.",
    "user assistant system add adds number object properties type function name description",
] * 3
SPECIAL = ["<pad>", "</s>", "<unk>", "<s>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
CHAT = "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}{{ tools or '' }}"


def trained(model, trainer, size, specials=SPECIAL, steps=None, corpus=TEXT, **options) -> Tokenizer:
    """Return a backend with these steps, trained on a corpus."""
    backend = Tokenizer(model)
    for name, step in (steps or {}).items():
        setattr(backend, name, step)

    training = trainer(vocab_size=size, special_tokens=specials, show_progress=False, **options)
    backend.train_from_iterator(corpus, training)
    return backend


def byte_level(whole_words: bool = False, corpus=TEXT) -> Tokenizer:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    steps = {"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=False), "decoder": decoders.ByteLevel()}
    backend = trained(models.BPE(), trainers.BpeTrainer, 500, steps=steps, corpus=corpus, initial_alphabet=alphabet)
    backend.model.ignore_merges = whole_words
    return backend


def pieces() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return tokens and merges like an export of SentencePiece's BPE, where all pairs that form a token are merges."""
    backend = trained(models.BPE(), trainers.BpeTrainer, 400, steps={"pre_tokenizer": pre_tokenizers.Metaspace()})
    by_id = sorted(backend.get_vocab().items(), key=lambda item: item[1])
    names = [name for name, _ in by_id][len(SPECIAL) :]
    vocab = {name: number for number, name in enumerate(SPECIAL + BYTES + names)}

    pairs = []
    for name in names:
        for cut in range(1, len(name)):
            start = name[:cut]
            end = name[cut:]
            if start in vocab and end in vocab:
                pairs.append((vocab[name], start, end))

    merges = [(start, end) for _, start, end in sorted(pairs)]
    return vocab, merges


def byte_fallback() -> Tokenizer:
    vocab, merges = pieces()
    backend = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return backend


def end_of_word() -> Tokenizer:
    steps = {"pre_tokenizer": pre_tokenizers.BertPreTokenizer(), "decoder": decoders.BPEDecoder()}
    model = models.BPE(unk_token="<unk>", end_of_word_suffix="</w>")
    return trained(model, trainers.BpeTrainer, 300, steps=steps, end_of_word_suffix="</w>")


def unigram(fallback: bool) -> Tokenizer:
    piece_ids, _ = pieces()
    words = [name for name in piece_ids if len(name) < 9 and name not in SPECIAL and name not in BYTES]

    scores = [(name, 0.0) for name in SPECIAL]
    if fallback:
        scores += [(byte, -30.0) for byte in BYTES]
    chance = random.Random(0)
    scores += [(name, -chance.uniform(4, 9) - len(name) / 2) for name in words]

    backend = Tokenizer(models.Unigram(scores, 2, fallback))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return backend


def wordpiece() -> Tokenizer:
    model = models.WordPiece(unk_token="[UNK]")
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    steps = {
        "normalizer": normalizers.BertNormalizer(),
        "pre_tokenizer": pre_tokenizers.BertPreTokenizer(),
        "decoder": decoders.WordPiece(),
    }
    return trained(model, trainers.WordPieceTrainer, 300, specials, steps)


MAKERS = {
    "byte level": byte_level,
    "whole words": lambda: byte_level(whole_words=True),
    "byte fallback": byte_fallback,
    "end of word": end_of_word,
    "unigram": lambda: unigram(False),
    "unigram of bytes": lambda: unigram(True),
    "wordpiece": wordpiece,
}
MERGED = ("byte level", "whole words", "byte fallback", "end of word")
kinds = pytest.mark.parametrize("kind", MAKERS)


@lru_cache
def original(kind: str) -> tuple[Vocabulary, PreTrainedTokenizerFast]:
    """Return the vocabulary of a tokenizer of one kind, and the tokenizer."""
    backend = MAKERS[kind]()
    if kind == "wordpiece":
        specials = {"pad_token": "[PAD]", "unk_token": "[UNK]", "sep_token": "[SEP]", "cls_token": "[CLS]"}
        backend.post_processor = BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    else:
        specials = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "bos_token": "<s>"}
        beginning = ("<s>", backend.token_to_id("<s>"))
        backend.post_processor = TemplateProcessing("<s> $A", "<s> $A $B", [beginning])

    backend.add_tokens([AddedToken("<tool>", normalized=False)])
    reader = PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=CHAT, **specials)
    return Vocabulary.of(reader), reader


def required(vocabulary: Vocabulary) -> frozenset[int]:
    """Return the tokens that text of any language needs."""
    return vocabulary.fixed | vocabulary.letters


def random_tokens(vocabulary: Vocabulary, seed: int, share: float) -> list[int]:
    """Return the required tokens and a random share of all others, with all parts of each token."""
    chance = random.Random(seed)
    tokens = set(range(vocabulary.size))
    removable = tokens - required(vocabulary)
    uses = Counter()
    for token in tokens:
        uses.update(vocabulary.parts(token))

    for _ in range(int((1 - share) * len(removable))):
        unused = [token for token in sorted(removable) if not uses[token]]
        if not unused:
            break

        token = chance.choice(unused)
        tokens.remove(token)
        removable.remove(token)
        uses.subtract(vocabulary.parts(token))
    return sorted(tokens)


@lru_cache
def smaller(kind: str, seed: int) -> tuple[list[int], PreTrainedTokenizerFast]:
    """Return random tokens of a tokenizer of one kind, and the tokenizer with only these tokens."""
    vocabulary, _ = original(kind)
    share = (0.0, 0.3, 0.6, 0.9)[seed]
    keep = random_tokens(vocabulary, seed, share)
    return keep, vocabulary.smaller(keep)


def with_words_and_spaces() -> Tokenizer:
    """Return a backend whose added tokens take spaces, or are words of the text."""
    backend = byte_level()
    backend.add_tokens([
        AddedToken("cat", single_word=True),
        AddedToken("  ", normalized=False),
        AddedToken("mats.", rstrip=True),
        AddedToken("there", lstrip=True, normalized=True),
    ])  # fmt: skip
    return backend


def split_digits() -> Tokenizer:
    steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=True)]
    backend = byte_level()
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    return backend


def with_prefix() -> Tokenizer:
    """Return the steps of Llama 2, where a normalizer writes the space before the first word."""
    backend = byte_fallback()
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    return backend


def trained_unigram() -> Tokenizer:
    steps = {
        "normalizer": normalizers.Sequence([normalizers.Nmt(), normalizers.NFKC()]),
        "pre_tokenizer": pre_tokenizers.Metaspace(prepend_scheme="first", split=False),
        # The decoder of the same name drops every space of the first token, and not only the prefix.
        "decoder": decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]),
    }
    return trained(models.Unigram(), trainers.UnigramTrainer, 300, steps=steps, unk_token="<unk>")


def short_words() -> Tokenizer:
    """Return a WordPiece backend with another prefix, for which a word of more than six letters is unknown."""
    steps = {
        "normalizer": normalizers.BertNormalizer(lowercase=False, strip_accents=True),
        "pre_tokenizer": pre_tokenizers.BertPreTokenizer(),
        "decoder": decoders.WordPiece(prefix="@@"),
    }
    model = models.WordPiece(unk_token="<unk>", max_input_chars_per_word=6)
    return trained(model, trainers.WordPieceTrainer, 300, steps=steps, continuing_subword_prefix="@@")


def padded() -> Tokenizer:
    backend = byte_level()
    backend.enable_truncation(8)
    backend.enable_padding(length=10, pad_id=0, pad_token="<pad>")
    return backend


VARIANTS = [with_words_and_spaces, split_digits, with_prefix, trained_unigram, short_words, padded]


@lru_cache
def smaller_variant(make, seed: int) -> tuple[PreTrainedTokenizerFast, list[int], PreTrainedTokenizerFast]:
    """Return a tokenizer, random tokens of it, and the tokenizer with only these tokens."""
    specials = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "bos_token": "<s>"}
    reader = PreTrainedTokenizerFast(tokenizer_object=make(), **specials)
    vocabulary = Vocabulary.of(reader)
    keep = random_tokens(vocabulary, seed, 0.5)
    return reader, keep, vocabulary.smaller(keep)


LETTERS = "abcdehinorstu THCü猫Кошк</>0123.,;\n"
texts = st.one_of(st.text(), st.text(LETTERS), st.lists(st.sampled_from(" ".join(TEXT).split(" "))).map(" ".join))


@kinds
@settings(max_examples=100)
@given(seed=st.integers(0, 3), text=texts)
def test_a_smaller_tokenizer_reads_the_same_text_as_the_original_one(kind, seed, text):
    _, original_reader = original(kind)
    keep, reader = smaller(kind, seed)

    original_ids = original_reader(text).input_ids
    ids = reader(text).input_ids

    assert reader.decode(ids) == original_reader.decode(original_ids)
    if set(original_ids) <= set(keep):
        assert [keep[token] for token in ids] == original_ids


@pytest.mark.parametrize("make", VARIANTS)
@settings(max_examples=100)
@given(seed=st.integers(0, 3), text=texts)
def test_odd_steps_around_a_tokenizer_read_the_same_text_with_fewer_tokens(make, seed, text):
    original_reader, keep, reader = smaller_variant(make, seed)
    original_ids = original_reader(text).input_ids
    ids = reader(text).input_ids

    assert reader.decode(ids) == original_reader.decode(original_ids)
    if set(original_ids) <= set(keep):
        assert [keep[token] for token in ids] == original_ids


@kinds
def test_the_parts_of_a_token_spell_it_once_it_is_removed(kind):
    vocabulary, reader = original(kind)
    parts = {token: vocabulary.parts(token) for token in range(vocabulary.size)}
    removable = parts.keys() - required(vocabulary)
    if kind in MERGED:
        for token in parts:
            removable -= set(parts[token])

    for token in random.Random(0).sample(sorted(removable), min(len(removable), 8)):
        keep = [kept_token for kept_token in parts if kept_token != token]
        model = vocabulary.smaller(keep).backend_tokenizer.model
        name = reader.convert_ids_to_tokens(token)

        # By itself, a token from the middle of a word would be read as a word.
        is_inside_word = name.startswith("##") or (kind == "end of word" and not name.endswith("</w>"))
        if parts[token] and not is_inside_word:
            spelling = model.tokenize(name.removesuffix("</w>"))
            assert tuple(keep[piece.id] for piece in spelling) == parts[token]


@kinds
def test_every_token_in_text_has_a_surface_and_required_parts(kind):
    vocabulary, reader = original(kind)
    ids = reader("the other cats sat on naive mats", add_special_tokens=False).input_ids
    surface = "".join(map(vocabulary.surface, ids))
    assert surface.strip() == reader.decode(ids).strip()

    tokens = set()
    for text in TEXT:
        tokens.update(reader(text).input_ids)

    required_tokens = required(vocabulary)
    for token in tokens - required_tokens:
        assert vocabulary.parts(token), reader.convert_ids_to_tokens(token)
        spelling = vocabulary.parts(token, required_tokens)
        assert spelling
        assert required_tokens.issuperset(spelling)


@kinds
def test_special_tokens_digits_bytes_and_the_tokens_of_chats_are_required(kind):
    vocabulary, reader = original(kind)
    required_tokens = required(vocabulary)
    names = {reader.convert_ids_to_tokens(token) for token in required_tokens}
    assert names.issuperset(reader.all_special_tokens)
    assert names.issuperset(["<tool>", "0"])
    if kind in ("byte fallback", "unigram of bytes"):
        assert names.issuperset(BYTES)

    chat = [{"role": role, "content": "0"} for role in ("user", "assistant")]
    assert required_tokens.issuperset(reader.apply_chat_template(chat)["input_ids"])

    if kind in MERGED:
        for token in required_tokens:
            assert required_tokens.issuperset(vocabulary.parts(token))


TOOL_CHAT = (
    "{% for m in messages %}{% if m.role == 'tool' %}<s>{{ m.content }} everywhere</s>"
    "{% elif m.tool_calls %}<s>sitzen {{ m.tool_calls[0].function.name }}</s>{% else %}<s>{{ m.content }}</s>"
    "{% endif %}{% endfor %}{% if enable_thinking is defined and not enable_thinking %}cats naïve{% endif %}"
)


def test_the_tokens_of_tool_calls_and_of_answers_without_thinking_are_required():
    reader = copy.deepcopy(original("byte level")[1])
    reader.chat_template = TOOL_CHAT
    required_tokens = required(Vocabulary.of(reader))

    call = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {}}}]}
    chat = [{"role": "user", "content": "0"}, call, {"role": "tool", "content": "0"}]
    ids = reader.apply_chat_template(chat, enable_thinking=False)["input_ids"]
    assert required_tokens.issuperset(ids)
    assert not required(original("byte level")[0]).issuperset(ids)


# The special tokens of each class that has a Unigram model.
UNIGRAM_SPECIALS = {
    "T5Tokenizer": ("<pad>", "</s>", "<unk>"),
    "XLMRobertaTokenizer": ("<s>", "<pad>", "</s>", "<unk>"),
    "AlbertTokenizer": ("<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]"),
}


def of_class(name: str) -> PreTrainedTokenizerFast:
    """Return a tiny tokenizer of a class of transformers. Most classes build their backend themselves."""
    tokenizer_class = getattr(transformers, name)
    if name in UNIGRAM_SPECIALS:
        scores = [(special, 0.0) for special in UNIGRAM_SPECIALS[name]]
        words = json.loads(unigram(False).to_str())["model"]["vocab"][len(SPECIAL) :]
        scores += [tuple(entry) for entry in words]
        return tokenizer_class(scores)

    if name in ("BertTokenizer", "MPNetTokenizer"):
        return tokenizer_class(wordpiece().get_vocab())

    if name in ("GemmaTokenizer", "LlamaTokenizer", "CodeLlamaTokenizer", "SeamlessM4TTokenizer"):
        vocab, merges = pieces()
        return tokenizer_class(vocab, merges)

    model = json.loads(byte_level().to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    return tokenizer_class(model["vocab"], merges)


CLASSES = (
    "GemmaTokenizer LlamaTokenizer CodeLlamaTokenizer BertTokenizer MPNetTokenizer T5Tokenizer XLMRobertaTokenizer "
    "AlbertTokenizer GPT2Tokenizer Qwen2Tokenizer Qwen3_5Tokenizer GPTNeoXTokenizer CohereTokenizer RobertaTokenizer "
    "DebertaTokenizer WhisperTokenizer SeamlessM4TTokenizer"
).split()


@pytest.mark.parametrize("name", CLASSES)
def test_a_smaller_tokenizer_of_every_class_reloads_unchanged(name, tmp_path):
    original_reader = of_class(name)
    vocabulary = Vocabulary.of(original_reader)
    keep = random_tokens(vocabulary, 0, 0.5)
    reader = vocabulary.smaller(keep)
    assert len(reader) == len(keep) < len(original_reader)
    vocabulary.check(reader, keep, TEXT)

    reader.save_pretrained(tmp_path)
    reloaded = AutoTokenizer.from_pretrained(tmp_path)
    assert type(reloaded) is type(original_reader)
    reloaded("")  # a translator has the post-processor of its output before it reads text
    assert reloaded.backend_tokenizer.to_str() == reader.backend_tokenizer.to_str()


@pytest.mark.parametrize("legacy", [True, False])
def test_a_smaller_llama_tokenizer_marks_spaces_in_the_same_places(legacy):
    vocab, merges = pieces()
    vocabulary = Vocabulary.of(transformers.LlamaTokenizer(vocab, merges, legacy=legacy))
    keep = sorted(required(vocabulary))
    reader = vocabulary.smaller(keep)
    vocabulary.check(reader, keep, ["cats</s>sat"] + TEXT)

    pre_tokenizer = json.loads(reader.backend_tokenizer.to_str())["pre_tokenizer"]
    assert pre_tokenizer["prepend_scheme"] == {True: "always", False: "first"}[legacy]


def test_a_smaller_tokenizer_pads_with_its_own_token_on_the_sides_of_the_original_one():
    _, shared_reader = original("byte level")
    original_reader = copy.deepcopy(shared_reader)
    vocabulary = Vocabulary.of(original_reader)
    original_reader.padding_side = "left"
    original_reader.truncation_side = "left"
    # This call leaves its padding in the backend.
    original_reader(TEXT, padding=True)

    keep = sorted(required(vocabulary))
    reader = vocabulary.smaller(keep)
    assert reader.padding_side == "left"
    assert reader.truncation_side == "left"
    assert reader.backend_tokenizer.padding is None

    rows = reader(["the", "the cats sat there"], padding=True).input_ids
    assert keep[rows[0][0]] == original_reader.pad_token_id


def test_a_smaller_tokenizer_does_not_save_other_forms_of_the_vocabulary(tmp_path):
    _, saved_reader = original("byte fallback")
    saved_reader.save_pretrained(tmp_path / "original")
    (tmp_path / "original" / "tokenizer.model").write_bytes(b"SentencePiece")
    original_reader = AutoTokenizer.from_pretrained(tmp_path / "original")

    vocabulary = Vocabulary.of(original_reader)
    reader = vocabulary.smaller(sorted(required(vocabulary)))
    reader.save_pretrained(tmp_path / "smaller")
    assert not (tmp_path / "smaller" / "tokenizer.model").exists()
    assert reader.name_or_path == original_reader.name_or_path


def test_a_smaller_tokenizer_keeps_named_chat_templates_and_the_tokens_of_their_text():
    _, shared_reader = original("byte level")
    original_reader = copy.deepcopy(shared_reader)
    second_template = "The other cats{{ messages[0]['content'] }}"
    original_reader.chat_template = {"default": CHAT, "other": second_template, "bad": "{{ 1 / 0 }}"}
    vocabulary = Vocabulary.of(original_reader)
    assert required(vocabulary).issuperset(original_reader("The other cats0").input_ids)

    keep = sorted(required(vocabulary))
    reader = vocabulary.smaller(keep)
    assert reader.chat_template == original_reader.chat_template
    vocabulary.check(reader, keep, TEXT)


def test_the_required_tokens_do_not_depend_on_the_date(monkeypatch):
    months = "January February March April May June July August September October November December".split()
    backend = byte_level(corpus=[f"on {month} in {month} 2031" for month in months] * 9)
    template = "Today is {{ strftime_now('%d %B %Y at %H:%M') }}." + CHAT
    reader = PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template)

    required_by_date = []
    for date in (datetime(2026, 1, 15, 8, 30), datetime(2031, 9, 28, 23, 59)):
        today_is(monkeypatch, date)
        vocabulary = Vocabulary.of(reader)
        keep = sorted(required(vocabulary))
        vocabulary.check(vocabulary.smaller(keep), keep, [])
        required_by_date.append(required(vocabulary))

    first, second = required_by_date
    assert first == second
    for month in months:
        assert second.issuperset(reader(f" {month}").input_ids)
    assert not first.issuperset(reader(" 2031").input_ids), "numbers are spelled by digits"


def test_a_tokenizer_that_reads_or_writes_other_text_fails_the_check():
    vocabulary, _ = original("byte level")
    keep = random_tokens(vocabulary, 0, 0.5)
    reader = vocabulary.smaller(keep)
    with pytest.raises(StructPruneError, match="All tokens of a text are kept, .* returns other tokens: '<s>system"):
        vocabulary.check(reader, list(range(vocabulary.size)), [TEXT[0]])

    normalizing_reader = copy.deepcopy(reader)
    normalizing_reader.backend_tokenizer.normalizer = normalizers.Replace("Ü", "U")
    with pytest.raises(StructPruneError, match="decodes another text than the original one: 'Numbers"):
        vocabulary.check(normalizing_reader, keep, TEXT[1:])

    chatting_reader = copy.deepcopy(reader)
    chatting_reader.chat_template += "."
    with pytest.raises(StructPruneError, match="chat template of the smaller tokenizer renders other text"):
        vocabulary.check(chatting_reader, keep, [])


def test_a_tokenizer_without_a_decoder_is_refused():
    described = json.loads(byte_level().to_str())
    described["decoder"] = None
    backend = Tokenizer.from_str(json.dumps(described))

    with pytest.raises(StructPruneError, match="The tokenizer has no decoder"):
        Vocabulary.of(PreTrainedTokenizerFast(tokenizer_object=backend))


def test_slow_tokenizers_and_a_class_that_ignores_its_file_are_refused():
    with pytest.raises(StructPruneError, match="ByT5Tokenizer, which is slow: it has no tokenizer.json"):
        Vocabulary.of(transformers.ByT5Tokenizer())

    reader = of_class("Qwen2Tokenizer")
    reader.backend_tokenizer.normalizer = normalizers.Lowercase()
    vocabulary = Vocabulary.of(reader)
    with pytest.raises(StructPruneError, match="Qwen2Tokenizer replaces the normalizer of its tokenizer.json"):
        vocabulary.smaller(range(vocabulary.size))


# --- the predictions of an original model, in the tokens of a smaller vocabulary
SIZE = 3
SPELLINGS = st.lists(st.lists(st.integers(0, SIZE - 1), min_size=2, max_size=4).map(tuple), unique=True, max_size=8)


def random_text(data, removed):
    """Return an alignment, original token ids, whether each of them counts, and their original logits."""
    spellings = [(0,), (1,), (2,)] + removed
    ids = data.draw(st.lists(st.integers(0, len(spellings) - 1), min_size=2, max_size=6))
    is_counted = [False]
    for _ in ids[1:]:
        is_counted.append(data.draw(st.booleans()))

    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    original_logits = torch.randn(sum(is_counted), len(spellings), generator=generator) * 3
    return TokenAlignment(spellings, SIZE), ids, is_counted, original_logits


def next_part(spellings, chances, previous_chances, prefix, previous_spelling):
    """Compute the distribution of the next part, and the probability of any next part, by enumeration of tokens.

    `chances` are the probabilities of the current original token, whose spelling begins with `prefix`.
    `previous_chances` are the probabilities of the original token before it, which was read as `previous_spelling`.
    They are None if that token does not count.
    """
    chance_by_part = [0.0] * SIZE
    chance_of_end = 0.0
    for token, spelling in enumerate(spellings):
        if prefix:
            if spelling == prefix:
                chance_of_end += chances[token]
            elif spelling[: len(prefix)] == prefix:
                chance_by_part[spelling[len(prefix)]] += chances[token]
        elif previous_chances is None:
            chance_by_part[spelling[0]] += chances[token]
        elif spelling == previous_spelling:
            # The previous token has ended, so any token may follow.
            for following_token, following_spelling in enumerate(spellings):
                chance_by_part[following_spelling[0]] += previous_chances[token] * chances[following_token]
        elif spelling[: len(previous_spelling)] == previous_spelling:
            chance_by_part[spelling[len(previous_spelling)]] += previous_chances[token]

    chance_of_part = sum(chance_by_part)
    if not chance_of_part:
        return chance_by_part, 0.0
    distribution = [chance / chance_of_part for chance in chance_by_part]
    return distribution, chance_of_part / (chance_of_part + chance_of_end)


@settings(max_examples=100)
@given(removed=SPELLINGS, data=st.data())
def test_the_next_part_has_the_probability_of_all_words_that_continue_with_it(removed, data):
    alignment, ids, is_counted, original_logits = random_text(data, removed)
    aligned = [token for token in alignment.align(ids, is_counted) if token.row >= 0]
    logits = torch.randn(len(aligned), SIZE, generator=torch.Generator().manual_seed(1))
    log_probabilities = logits.log_softmax(-1).tolist()
    original_probabilities = original_logits.softmax(-1).tolist()

    expected = torch.zeros(len(original_logits))
    row = -1
    place = 0
    previous_chances = None
    for position, (token, counts) in enumerate(zip(ids, is_counted, strict=True)):
        if not counts:
            previous_chances = None
            continue

        row += 1
        chances = original_probabilities[row]
        spelling = alignment.spellings[token]
        previous_spelling = alignment.spellings[ids[position - 1]]
        for end, part in enumerate(spelling):
            assert aligned[place].token == part
            assert aligned[place].row == row

            prefix = spelling[:end]
            target, weight = next_part(alignment.spellings, chances, previous_chances, prefix, previous_spelling)
            pairs = zip(target, log_probabilities[place], strict=True)
            expected[row] += weight * sum(chance * (log(chance) - predicted) for chance, predicted in pairs if chance)
            place += 1
        previous_chances = chances

    if aligned:
        _, rows, nodes = torch.tensor(aligned).unbind(1)
        divergences = aligned_divergence(alignment, logits, original_logits, rows, nodes)
        torch.testing.assert_close(divergences, expected, atol=1e-5, rtol=1e-4)


def test_without_removed_tokens_the_divergence_is_the_plain_divergence():
    alignment = TokenAlignment([(token,) for token in range(200)], 200)
    ids = torch.randint(200, (150,)).tolist()
    is_counted = [False] + [True] * 149
    _, rows, nodes = torch.tensor(alignment.align(ids, is_counted)[1:]).unbind(1)

    logits, original_logits = torch.randn(2, 149, 200)
    divergences = aligned_divergence(alignment, logits, original_logits, rows, nodes)
    torch.testing.assert_close(divergences, divergence(logits, original_logits))


def model_for(reader):
    return random_model(AutoModelForCausalLM, "llama", GROUPED | {"vocab_size": len(reader)})


@kinds
def test_text_is_spelled_by_the_parts_of_its_tokens(kind):
    _, original_reader = original(kind)
    keep, reader = smaller(kind, 1)
    original_model = model_for(original_reader)
    model = model_for(reader)
    alignment = TokenAlignment.between(original_model, original_reader, model, reader)
    assert [alignment.spellings[token] for token in keep] == [(new_id,) for new_id in range(len(keep))]

    added_tokens = 0
    for text in TEXT:
        original_ids = original_reader(text).input_ids
        ids = [entry.token for entry in alignment.align(original_ids, [False] * len(original_ids))]
        assert reader.decode(ids) == original_reader.decode(original_ids)
        added_tokens += len(ids) - len(original_ids)
    assert added_tokens

    rows = [original_reader(text).input_ids for text in TEXT[:2]]
    labels = [torch.tensor([-100] * context + row[context:]) for row, context in zip(rows, (1, 4), strict=True)]
    text = Text([torch.tensor(row) for row in rows], labels=labels)
    divergences = totals(measure(model, text, original_model, alignment).kl)
    assert divergences.shape == (2,)
    assert (divergences > 0).all()

    identity = TokenAlignment.between(original_model, original_reader, original_model, original_reader)
    assert totals(measure(original_model, text, original_model, identity).kl).abs().max() < 1e-4
    with pytest.raises(StructPruneError, match="by the same ids they mean other tokens"):
        TokenAlignment.between(model, reader, original_model, original_reader)
