"""Translators keep the tokens of their languages, and begin with the one that they are told to."""

import json
from dataclasses import replace
from functools import partial
from itertools import islice

import pytest
import torch
from helpers import with_long
from models import TOKENS, config, random_model
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    M2M100ForConditionalGeneration,
    MBart50Tokenizer,
    MBartForConditionalGeneration,
    MBartTokenizer,
    MT5ForConditionalGeneration,
    NllbTokenizer,
    T5Tokenizer,
)

from optimum_structprune import DomainConfig, StructPruner
from optimum_structprune.arch.load import ModelInfo
from optimum_structprune.domains.sources import builtin_documents
from optimum_structprune.vocabulary.choose import VocabularyRequest
from optimum_structprune.vocabulary.languages import CHOOSING, texts
from optimum_structprune.vocabulary.parts import Parts


SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]
SIZES = {
    **{"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 40, "decoder_ffn_dim": 36},
    **{"encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 256},
    **{**TOKENS, "bos_token_id": 0, "pad_token_id": 1, "decoder_start_token_id": 2},
}
T5_SIZES = {
    **TOKENS,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 40,
    "num_layers": 1,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}


def trained(model, trainer, read=None):
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.train_from_iterator(read or islice(builtin_documents("prose"), 50), trainer)
    return backend


def merged(read=None):
    backend = trained(models.BPE(unk_token="<unk>"), trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL), read)
    merges = [tuple(pair) for pair in json.loads(backend.to_str())["model"]["merges"]]
    return {"vocab": backend.get_vocab(), "merges": merges}


def scored(read=None, special=SPECIAL):
    trainer = trainers.UnigramTrainer(vocab_size=400, special_tokens=special, unk_token="<unk>")
    backend = trained(models.Unigram(), trainer, read)
    return {"vocab": [tuple(pair) for pair in json.loads(backend.to_str())["model"]["vocab"]]}


# The class of a tokenizer, what it is made of, the class of a model and its type, and two languages.
KINDS = {
    "nllb": (NllbTokenizer, merged, M2M100ForConditionalGeneration, "m2m_100", ("eng_Latn", "deu_Latn")),
    "mbart": (MBartTokenizer, scored, MBartForConditionalGeneration, "mbart", ("en_XX", "de_DE")),
    "mbart50": (
        MBart50Tokenizer,
        partial(scored, special=["<unk>", "<s>", "</s>"]),
        MBartForConditionalGeneration,
        "mbart",
        ("en_XX", "de_DE"),
    ),
}


def pruned(reader, model, folder):
    prose = [DomainConfig(name="prose", source="builtin:prose")]
    pruner = StructPruner(config(domains=prose, widths={"vocab": len(reader) - 80}, seq_length=48))
    pruner.save(pruner.prune_model(model, reader), folder)
    again = AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    return again, AutoTokenizer.from_pretrained(folder), [*pruner.plan.keep[-1, "vocab"]]


@torch.no_grad()
def assert_same(model, again, ids, keep, **options):
    """What both write is the same, if the dense model writes tokens that stay."""
    gone = [token for token in range(model.config.vocab_size) if token not in keep]
    new = {old: number for number, old in enumerate(keep)}
    limits = {"max_new_tokens": 6, "do_sample": False, "num_beams": 1}
    forced = {name: new[of] for name, of in options.items()}
    dense = model.generate(torch.tensor(keep)[ids], suppress_tokens=gone, **limits, **options)
    small = again.generate(ids, **limits, **forced)
    assert torch.equal(torch.tensor(keep)[small], dense) and all(of in small for of in forced.values())


@pytest.mark.parametrize("kind", with_long(KINDS, ["nllb"]))
def test_languages_stay_and_a_translation_begins_with_the_one_that_is_forced(kind, tmp_path):
    tokenizer, made_of, cls, model_type, (source, target) = KINDS[kind]
    reader = tokenizer(**made_of(), src_lang=source, tgt_lang=target)
    model = random_model(cls, model_type, {**SIZES, "vocab_size": len(reader)})
    forced = reader.convert_tokens_to_ids(target)
    model.generation_config.forced_bos_token_id = forced
    again, smaller, keep = pruned(reader, model, tmp_path / "small")
    assert type(smaller) is type(reader) and len(smaller) == len(keep) == len(reader) - 80
    for code in (source, target, reader.mask_token):
        assert keep[smaller.convert_tokens_to_ids(code)] == reader.convert_tokens_to_ids(code)
    assert keep[again.generation_config.forced_bos_token_id] == forced
    assert keep[again.config.decoder_start_token_id] == 2
    text = "The sun had set, and they walked home."
    ids = smaller(text, return_tensors="pt")["input_ids"]
    assert smaller.convert_tokens_to_ids(source) in ids
    assert smaller.decode(ids[0]) == reader.decode(torch.tensor(keep)[ids[0]])
    assert_same(model, again, ids, keep, forced_bos_token_id=forced)


@pytest.mark.parametrize("kind", with_long(["nllb", "mbart"], ["mbart"]))
@pytest.mark.parametrize("shown", [False, True], ids=["named alone", "shown by text"])
def test_letters_of_scripts_that_are_neither_named_nor_in_the_text_go_first(kind, shown, tmp_path):
    tokenizer, made_of, cls, model_type, (source, target) = KINDS[kind]
    reader = tokenizer(**made_of([texts()[code] for code in ("en", "ru", "el")]), src_lang=source, tgt_lang=target)
    read = [f"{texts(CHOOSING)[code]} {n}" for n in range(40) for code in ("en", "ru")[: 1 + shown]]
    model = random_model(cls, model_type, {**SIZES, "vocab_size": len(reader)})
    asked = config(domains=[DomainConfig("a", read)], languages=["en"], widths={"vocab": len(reader)})
    fewest = VocabularyRequest.of(asked, ModelInfo.of(model), reader, asked.widths).allowed.start
    pruner = StructPruner(replace(asked, widths={"vocab": fewest + 80}))
    small = pruner.prune_model(model, reader)
    smaller, remarks = pruner.tokenizer, str(pruner.report)
    unknown = {code: reader.unk_token_id in smaller(texts()[code]).input_ids for code in ("en", "ru", "el")}
    assert unknown == {"en": False, "ru": not shown, "el": True}
    greek = reader(texts()["el"]).input_ids
    spelled = Parts.between(model, reader, small, smaller).spelled(greek, [True] * len(greek))
    assert smaller.unk_token_id in {part for part, *_ in spelled}
    lines = [line for line in remarks.splitlines() if line.startswith("letters that cannot be read")]
    assert "Greek" in lines[0] and ("Cyrillic" in lines[0]) == (not shown)


@pytest.mark.slow
def test_the_sentinels_of_mt5_stay(tmp_path):
    reader = T5Tokenizer(**scored(special=["<pad>", "</s>", "<unk>"]), extra_ids=100)
    model = random_model(
        MT5ForConditionalGeneration, "mt5", {**T5_SIZES, "eos_token_id": 1, "vocab_size": len(reader)}
    )
    again, smaller, keep = pruned(reader, model, tmp_path / "small")
    ids = smaller("The sun <extra_id_0> set, and <extra_id_1> home.", return_tensors="pt")["input_ids"]
    for sentinel in ("<extra_id_0>", "<extra_id_1>", "<extra_id_99>"):
        assert keep[smaller.convert_tokens_to_ids(sentinel)] == reader.convert_tokens_to_ids(sentinel)
    assert smaller.convert_tokens_to_ids("<extra_id_1>") in ids
    assert smaller.decode(ids[0]) == reader.decode(torch.tensor(keep)[ids[0]])
    assert_same(model, again, ids, keep)
