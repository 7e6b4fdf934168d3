"""Tokenizers without some of their tokens: every kind reads as before what is left of it."""

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
from helpers import today_is
from hypothesis import given, settings
from hypothesis import strategies as st
from models import GROUPED, random_model
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import BertProcessing, TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from optimum_structprune import StructPruneError
from optimum_structprune.forward.metrics import divergence
from optimum_structprune.vocabulary.token_alignment import TokenAlignment, divergence_from_dense
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


def trained(model, trainer, size, specials=SPECIAL, steps=None, read=TEXT, **options) -> Tokenizer:
    backend = Tokenizer(model)
    for name, step in (steps or {}).items():
        setattr(backend, name, step)
    how = trainer(vocab_size=size, special_tokens=specials, show_progress=False, **options)
    backend.train_from_iterator(read, how)
    return backend


def byte_level(whole_words: bool = False, read=TEXT) -> Tokenizer:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    steps = {"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=False), "decoder": decoders.ByteLevel()}
    backend = trained(models.BPE(), trainers.BpeTrainer, 500, steps=steps, read=read, initial_alphabet=alphabet)
    backend.model.ignore_merges = whole_words
    return backend


def pieces() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Tokens and merges as SentencePiece's BPE is exported: each token by all the pairs that make it."""
    model = trained(models.BPE(), trainers.BpeTrainer, 400, steps={"pre_tokenizer": pre_tokenizers.Metaspace()})
    names = [name for name, _ in sorted(model.get_vocab().items(), key=lambda item: item[1])]
    vocab = {name: number for number, name in enumerate([*SPECIAL, *BYTES, *names[len(SPECIAL) :]])}
    pairs = [
        (vocab[name], name[:cut], name[cut:])
        for name in names[len(SPECIAL) :]
        for cut in range(1, len(name))
        if name[:cut] in vocab and name[cut:] in vocab
    ]
    return vocab, [(left, right) for _, left, right in sorted(pairs)]


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
    vocab = [name for name in pieces()[0] if len(name) < 9 and name not in (*SPECIAL, *BYTES)]
    chance = random.Random(0)
    scored = [*((name, 0.0) for name in SPECIAL), *((byte, -30.0) for byte in BYTES * fallback)]
    scored += [(name, -chance.uniform(4, 9) - len(name) / 2) for name in vocab]
    backend = Tokenizer(models.Unigram(scored, 2, fallback))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return backend


def wordpiece() -> Tokenizer:
    steps = {"normalizer": normalizers.BertNormalizer(), "pre_tokenizer": pre_tokenizers.BertPreTokenizer()}
    steps["decoder"] = decoders.WordPiece()
    model, specials = models.WordPiece(unk_token="[UNK]"), ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
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
def dense(kind: str) -> tuple[Vocabulary, PreTrainedTokenizerFast]:
    backend = MAKERS[kind]()
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "bos_token": "<s>"}
    if kind == "wordpiece":
        names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "sep_token": "[SEP]", "cls_token": "[CLS]"}
        backend.post_processor = BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    else:
        backend.post_processor = TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", backend.token_to_id("<s>"))])
    backend.add_tokens([AddedToken("<tool>", normalized=False)])
    reader = PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=CHAT, **names)
    return Vocabulary.of(reader), reader


def required(vocabulary: Vocabulary) -> frozenset[int]:
    """The tokens to keep for text of any language."""
    return vocabulary.fixed | vocabulary.letters


def some(vocabulary: Vocabulary, seed: int, share: float) -> list[int]:
    """Of the tokens that may go, a share stays by chance; a token that another is formed from goes after it."""
    chance, kept = random.Random(seed), set(range(vocabulary.size))
    uses = Counter(part for token in kept for part in vocabulary.parts(token))
    for _ in range(int((1 - share) * len(kept - required(vocabulary)))):
        if leaves := [token for token in sorted(kept - required(vocabulary)) if not uses[token]]:
            kept.remove(token := chance.choice(leaves))
            uses.subtract(vocabulary.parts(token))
    return sorted(kept)


@lru_cache
def smaller(kind: str, seed: int) -> tuple[list[int], PreTrainedTokenizerFast]:
    keep = some(dense(kind)[0], seed, share=(0.0, 0.3, 0.6, 0.9)[seed])
    return keep, dense(kind)[0].smaller(keep)


LETTERS = "abcdehinorstu THCü猫Кошк</>0123.,;\n"
texts = st.one_of(st.text(), st.text(LETTERS), st.lists(st.sampled_from(" ".join(TEXT).split(" "))).map(" ".join))


@kinds
@settings(max_examples=100)
@given(seed=st.integers(0, 3), text=texts)
def test_a_smaller_tokenizer_reads_what_the_dense_one_reads(kind, seed, text):
    reader, (keep, less) = dense(kind)[1], smaller(kind, seed)
    before, after = reader(text).input_ids, less(text).input_ids
    assert less.decode(after) == reader.decode(before)
    if set(before) <= set(keep):
        assert [keep[token] for token in after] == before


@kinds
def test_the_parts_of_a_token_are_what_it_is_read_as_without_it(kind):
    vocabulary, reader = dense(kind)
    parts = {token: vocabulary.parts(token) for token in range(vocabulary.size)}
    needed = {part for token in parts for part in parts[token]} if kind in MERGED else set()
    may_go = sorted(parts.keys() - required(vocabulary) - needed)
    for token in random.Random(0).sample(may_go, min(len(may_go), 8)):
        keep = [other for other in parts if other != token]
        name, model = reader.convert_ids_to_tokens(token), vocabulary.smaller(keep).backend_tokenizer.model
        # Alone, a token of the middle of a word would be read as a word.
        if parts[token] and not name.startswith("##") and (kind != "end of word" or name.endswith("</w>")):
            assert tuple(keep[piece.id] for piece in model.tokenize(name.removesuffix("</w>"))) == parts[token]


@kinds
def test_every_token_that_is_read_has_a_surface_and_parts_of_tokens_that_stay(kind):
    vocabulary, reader = dense(kind)
    ids = reader("the other cats sat on naive mats", add_special_tokens=False).input_ids
    assert "".join(map(vocabulary.surface, ids)).strip() == reader.decode(ids).strip()
    for token in {token for text in TEXT for token in reader(text).input_ids} - required(vocabulary):
        assert vocabulary.parts(token), reader.convert_ids_to_tokens(token)
        assert required(vocabulary).issuperset(vocabulary.parts(token, required(vocabulary)) or [-1])


@kinds
def test_what_always_stays(kind):
    vocabulary, reader = dense(kind)
    names = {reader.convert_ids_to_tokens(token) for token in required(vocabulary)}
    assert names.issuperset([*reader.all_special_tokens, "<tool>", "0"])
    assert names.issuperset(BYTES) or kind not in ("byte fallback", "unigram of bytes")
    chat = [{"role": role, "content": "0"} for role in ("user", "assistant")]
    assert required(vocabulary).issuperset(reader.apply_chat_template(chat)["input_ids"])
    assert kind not in MERGED or all(
        required(vocabulary).issuperset(vocabulary.parts(t)) for t in required(vocabulary)
    )


def of_class(name: str) -> PreTrainedTokenizerFast:
    """A tiny tokenizer of a class of transformers, most of which build their backend themselves."""
    model = json.loads(byte_level().to_str())["model"]
    scored = [tuple(entry) for entry in json.loads(unigram(False).to_str())["model"]["vocab"]][len(SPECIAL) :]
    specials = {"T5Tokenizer": ("<pad>", "</s>", "<unk>"), "XLMRobertaTokenizer": ("<s>", "<pad>", "</s>", "<unk>")}
    specials["AlbertTokenizer"] = ("<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]")
    if name in specials:
        arguments = ([*((special, 0.0) for special in specials[name]), *scored],)
    elif name in ("BertTokenizer", "MPNetTokenizer"):
        arguments = (wordpiece().get_vocab(),)
    elif name in ("GemmaTokenizer", "LlamaTokenizer", "CodeLlamaTokenizer"):
        arguments = pieces()
    else:
        arguments = (model["vocab"], [tuple(pair) for pair in model["merges"]])
    return getattr(transformers, name)(*arguments)


@pytest.mark.parametrize("name", (
    "GemmaTokenizer LlamaTokenizer CodeLlamaTokenizer BertTokenizer MPNetTokenizer T5Tokenizer XLMRobertaTokenizer "
    "AlbertTokenizer GPT2Tokenizer Qwen2Tokenizer Qwen3_5Tokenizer GPTNeoXTokenizer CohereTokenizer RobertaTokenizer "
    "DebertaTokenizer WhisperTokenizer"
).split())  # fmt: skip
def test_every_class_is_loaded_again_as_it_is(name, tmp_path):
    reader = of_class(name)
    vocabulary = Vocabulary.of(reader)
    keep = some(vocabulary, 0, 0.5)
    less = vocabulary.smaller(keep)
    assert len(less) == len(keep) < len(reader)
    vocabulary.check(less, keep, TEXT)
    less.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert type(again) is type(reader)
    assert again.backend_tokenizer.to_str() == less.backend_tokenizer.to_str()


@pytest.mark.parametrize("legacy", [True, False])
def test_where_llama_marks_a_space_survives_losing_tokens(legacy):
    vocabulary = Vocabulary.of(transformers.LlamaTokenizer(*pieces(), legacy=legacy))
    less = vocabulary.smaller(keep := sorted(required(vocabulary)))
    vocabulary.check(less, keep, ["cats</s>sat", *TEXT])
    scheme = json.loads(less.backend_tokenizer.to_str())["pre_tokenizer"]["prepend_scheme"]
    assert scheme == {True: "always", False: "first"}[legacy]


def test_a_smaller_tokenizer_pads_with_its_own_token_and_cuts_where_the_dense_one_does_now():
    _, reader = copy.deepcopy(dense("byte level"))
    vocabulary, reader.padding_side, reader.truncation_side = Vocabulary.of(reader), "left", "left"
    reader(TEXT, padding=True)
    less = vocabulary.smaller(keep := sorted(required(vocabulary)))
    assert (less.padding_side, less.truncation_side, less.backend_tokenizer.padding) == ("left", "left", None)
    assert keep[less(["the", "the cats sat there"], padding=True).input_ids[0][0]] == reader.pad_token_id


def test_files_of_other_forms_are_not_saved_again(tmp_path):
    dense("byte fallback")[1].save_pretrained(tmp_path / "dense")
    (tmp_path / "dense" / "tokenizer.model").write_bytes(b"SentencePiece")
    reader = AutoTokenizer.from_pretrained(tmp_path / "dense")
    vocabulary = Vocabulary.of(reader)
    less = vocabulary.smaller(sorted(required(vocabulary)))
    less.save_pretrained(tmp_path / "less")
    assert not (tmp_path / "less" / "tokenizer.model").exists()
    assert less.name_or_path == reader.name_or_path


def test_named_chat_templates_and_what_they_write_stay():
    reader, other = copy.deepcopy(dense("byte level")[1]), "The other cats{{ messages[0]['content'] }}"
    reader.chat_template = {"default": CHAT, "other": other, "bad": "{{ 1 / 0 }}"}
    vocabulary = Vocabulary.of(reader)
    assert required(vocabulary).issuperset(reader("The other cats0").input_ids)
    less = vocabulary.smaller(sorted(required(vocabulary)))
    assert less.chat_template == reader.chat_template
    vocabulary.check(less, sorted(required(vocabulary)), TEXT)


def test_the_tokens_that_stay_do_not_depend_on_the_day(monkeypatch):
    months = "January February March April May June July August September October November December".split()
    backend = byte_level(read=[f"on {month} in {month} 2031" for month in months] * 9)
    template = "Today is {{ strftime_now('%d %B %Y at %H:%M') }}." + CHAT
    reader = PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template)
    always = []
    for date in (datetime(2026, 1, 15, 8, 30), datetime(2031, 9, 28, 23, 59)):
        today_is(monkeypatch, date)
        vocabulary = Vocabulary.of(reader)
        vocabulary.check(vocabulary.smaller(sorted(required(vocabulary))), sorted(required(vocabulary)), [])
        always.append(required(vocabulary))
    assert always[0] == always[1] >= {token for month in months for token in reader(f" {month}").input_ids}
    assert not always[0] >= {*reader(" 2031").input_ids}, "numbers are spelled by digits"


def test_what_reads_otherwise_is_not_proved():
    vocabulary, reader = dense("byte level")
    keep, every = some(vocabulary, 0, 0.5), list(range(vocabulary.size))
    less = vocabulary.smaller(keep)
    with pytest.raises(StructPruneError, match="All tokens of a text are kept, .* returns other tokens: '<s>system"):
        vocabulary.check(less, every, [TEXT[0]])
    other = copy.deepcopy(less)
    other.backend_tokenizer.normalizer = normalizers.Replace("Ü", "U")
    with pytest.raises(StructPruneError, match="decodes another text than the dense one: 'Numbers"):
        vocabulary.check(other, keep, TEXT[1:])
    other = copy.deepcopy(less)
    other.chat_template += "."
    with pytest.raises(StructPruneError, match="chat template of the smaller tokenizer renders other text"):
        vocabulary.check(other, keep, [])


def test_slow_tokenizers_and_a_class_that_ignores_its_file_are_refused():
    with pytest.raises(StructPruneError, match="ByT5Tokenizer, which is slow: it has no tokenizer.json"):
        Vocabulary.of(transformers.ByT5Tokenizer())
    reader = of_class("Qwen2Tokenizer")
    reader.backend_tokenizer.normalizer = normalizers.Lowercase()
    vocabulary = Vocabulary.of(reader)
    with pytest.raises(StructPruneError, match="Qwen2Tokenizer replaces the normalizer of its tokenizer.json"):
        vocabulary.smaller(range(vocabulary.size))


# --- what a dense model expects of words, in the tokens that a smaller vocabulary spells them by
SIZE = 3
SPELLINGS = st.lists(st.lists(st.integers(0, SIZE - 1), min_size=2, max_size=4).map(tuple), unique=True, max_size=8)


def random_text(data, lost):
    """An alignment, a text of dense tokens, which of them are counted, and what a model expects for each of these."""
    spellings = [(0,), (1,), (2,), *lost]
    ids = data.draw(st.lists(st.integers(0, len(spellings) - 1), min_size=2, max_size=6))
    counted = [False, *(data.draw(st.booleans()) for _ in ids[1:])]
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    return (
        TokenAlignment(spellings, SIZE),
        ids,
        counted,
        torch.randn(sum(counted), len(spellings), generator=generator) * 3,
    )


def next_part(spellings, now, before, read, last):
    """By enumeration of tokens, and of pairs of them: the probability of each next part, and that one of them follows.

    `now` is expected of the token of which `read` is read, and `before` of the one before it, which was read as all of
    `last`; None where nobody knows.
    """
    ways = {None: 0.0}  # the probability of what may follow; None is what nobody knows

    def add(follows, chance):
        ways[follows] = ways.get(follows, 0.0) + chance

    for token, spelling in enumerate(spellings):
        if read and spelling[: len(read)] == read:
            add(spelling[len(read)] if len(spelling) > len(read) else None, now[token])
        elif not read and before is None:
            add(spelling[0], now[token])
        elif not read and spelling == last:
            for other, following in enumerate(spellings):
                add(following[0], before[token] * now[other])
        elif not read and spelling[: len(last)] == last:
            add(spelling[len(last)], before[token])
    total, known = sum(ways.values()), sum(ways.values()) - ways[None]
    return [ways.get(part, 0) / known if known else 0 for part in range(SIZE)], known / total


@settings(max_examples=100)
@given(lost=SPELLINGS, data=st.data())
def test_the_next_part_is_expected_as_all_words_that_have_it_there_are_together(lost, data):
    parts, ids, counted, logits = random_text(data, lost)
    expected, number = torch.zeros(len(logits)), -1
    spelled = [entry for entry in parts.align(ids, counted) if entry[1] >= 0]
    student = torch.randn(len(spelled), SIZE, generator=torch.Generator().manual_seed(1))
    chances, place, before = logits.softmax(-1).tolist(), 0, None
    for at, (token, counts) in enumerate(zip(ids, counted, strict=True)):
        number += counts
        for end in range(len(parts.spellings[token]) if counts else 0):
            read, last = parts.spellings[token][:end], parts.spellings[ids[at - 1]]
            target, sure = next_part(parts.spellings, chances[number], before, read, last)
            ours = student[place].log_softmax(-1).tolist()
            assert spelled[place][:2] == (parts.spellings[token][end], number)
            expected[number] += sure * sum(p * (log(p) - q) for p, q in zip(target, ours, strict=True) if p)
            place += 1
        before = chances[number] if counts else None
    if spelled:
        _, rows, nodes = torch.tensor(spelled).unbind(1)
        torch.testing.assert_close(parts.divergence(student, logits, rows, nodes), expected, atol=1e-5, rtol=1e-4)


def test_where_all_tokens_stay_it_is_the_plain_divergence():
    parts = TokenAlignment([(token,) for token in range(200)], 200)
    ids = torch.randint(200, (150,)).tolist()
    _, rows, nodes = torch.tensor(parts.align(ids, [False, *[True] * 149])[1:]).unbind(1)
    ours, dense = torch.randn(2, 149, 200)
    torch.testing.assert_close(parts.divergence(ours, dense, rows, nodes), divergence(ours, dense, mean=False))


@kinds
def test_text_is_spelled_by_the_parts_of_its_tokens(kind):
    reader, (keep, less) = dense(kind)[1], smaller(kind, 1)
    sizes = [{**GROUPED, "vocab_size": len(each)} for each in (reader, less)]
    whole, small = (random_model(AutoModelForCausalLM, "llama", fields) for fields in sizes)
    parts = TokenAlignment.between(whole, reader, small, less)
    assert [parts.spellings[token] for token in keep] == [(new,) for new in range(len(keep))]
    split = 0
    for text in TEXT:
        ids = reader(text).input_ids
        spelled = [part for part, *_ in parts.align(ids, [False] * len(ids))]
        assert less.decode(spelled) == reader.decode(ids)
        split += len(spelled) - len(ids)
    assert split
    rows = [reader(text).input_ids for text in TEXT[:2]]
    found = divergence_from_dense(parts, whole, small, rows, (1, 4))
    assert found.shape == (2,) and (found > 0).all()
    same = TokenAlignment.between(whole, reader, whole, reader)
    assert divergence_from_dense(same, whole, whole, rows, (1, 4)).abs().max() < 1e-4
    with pytest.raises(StructPruneError, match="by the same ids they mean other tokens"):
        TokenAlignment.between(small, less, whole, reader)
