"""A model and a tokenizer of other tokens are never taken for a pair, wherever the two come together."""

from copy import deepcopy

import pytest
import torch
from helpers import error_line, recovery_config, save_with_tokenizer, unread, with_tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from models import VOCAB, build, config, documents, real_text_model, tokenizer
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from optimum_structprune import DomainConfig, StructPruner, evaluate, export_gguf, prune_model, recover
from optimum_structprune.commands.cli import main
from optimum_structprune.domains.manifest import check_tokens, has_files, remember_text, tokenizer_of
from optimum_structprune.domains.packing import Passages
from optimum_structprune.errors import StructPruneError
from optimum_structprune.evaluation.heldout import read_heldout
from optimum_structprune.forward.metrics import row_losses, sample_losses


ORDER = [0, 1, 2, *range(VOCAB - 1, 2, -1)]
OTHERS = (
    "of 96 tokens, does not belong to this LlamaForCausalLM, which has 96 tokens and 96 rows. "
    "Different tokens: w95, w94, w93"
)


def words(vocabulary):
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(dict(vocabulary), unk_token="t0")))


NAMES, IDS = [f"t{number}" for number in range(8)], range(12)
PAIRS, PARTS = st.tuples(st.sampled_from(NAMES), st.sampled_from(IDS)), (lambda pair: pair[0], lambda pair: pair[1])
VOCABULARIES = st.lists(PAIRS, min_size=1, unique_by=PARTS)


@pytest.mark.slow
@settings(max_examples=200)
@given(own=VOCABULARIES, other=VOCABULARIES | st.just([]), change=st.sampled_from(["none", "less", "any"]))
def test_a_tokenizer_is_refused_where_an_id_means_another_token_or_has_no_row(own, other, change):
    model = build("llama-tied")
    model.resize_token_embeddings(10)
    other = own if change == "none" else own[: len(other)] or own if change == "less" else other or own
    remember_text(model, words(own))
    pairs = [(mine, theirs) for mine in own for theirs in other]
    wrong = any((mine[0] == theirs[0]) != (mine[1] == theirs[1]) and theirs[1] < 10 for mine, theirs in pairs)
    if wrong or {number for _, number in other if number >= 10} - {number for _, number in own}:
        with pytest.raises(StructPruneError, match="does not belong to this LlamaForCausalLM"):
            check_tokens(model, words(other))
    else:
        check_tokens(model, words(other))


TEXT = [DomainConfig("unread", unread())]
PLACES = {
    "prune": lambda model, reader: prune_model(model, config(domains=TEXT), reader),
    "evaluate": lambda model, reader: evaluate(model, reader, TEXT, seq_length=24),
    "dense": lambda model, reader: evaluate(build("llama-tied"), reader, TEXT, dense=model, seq_length=24),
    "gguf": lambda model, reader: export_gguf(model, "nowhere.gguf", reader),
    "recover": lambda model, reader: recover(model, reader, recovery_config(domains=TEXT)),
}


@pytest.mark.parametrize("place", PLACES)
def test_every_place_refuses_a_tokenizer_of_as_many_other_tokens_before_text_is_read(tmp_path, place):
    other = with_tokens(build("llama-tied"), tokenizer(), ORDER)[1]
    save_with_tokenizer(build("llama-tied"), tmp_path)
    with pytest.raises(StructPruneError, match=OTHERS):
        PLACES[place](AutoModelForCausalLM.from_pretrained(tmp_path), other)


def test_what_a_run_has_returned_is_read_by_the_tokenizer_of_the_run():
    model, other = build("llama-tied"), with_tokens(build("llama-tied"), tokenizer(), ORDER)[1]
    pruned = prune_model(model, config(), tokenizer())
    copied = deepcopy(pruned)
    for known in (model, copied, recover(pruned, tokenizer(), recovery_config(tokens=96))):
        with pytest.raises(StructPruneError, match=OTHERS):
            evaluate(known, other, TEXT, seq_length=24)


def test_a_copy_of_the_tokenizer_is_the_same_and_nothing_is_known_without_files(tmp_path):
    save_with_tokenizer(build("llama-tied"), tmp_path / "both")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "both")
    evaluate(model, AutoTokenizer.from_pretrained(tmp_path / "both"), config().domains, seq_length=24, num_samples=2)
    model.resize_token_embeddings(100)  # with tokens that the saved tokenizer has not
    assert tokenizer_of(model) is None
    # transformers makes up a tokenizer of one token for this type.
    build("gpt2-tied").save_pretrained(tmp_path / "alone")
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "alone")
    assert len(AutoTokenizer.from_pretrained(tmp_path / "alone")) == 1 and tokenizer_of(alone) is None
    assert tokenizer_of(deepcopy(model)) is None


@pytest.mark.parametrize("case", ["t5", "deberta-v2", "bert", "gpt2-tied"])
def test_what_transformers_makes_up_where_there_is_no_tokenizer_is_none(case, tmp_path, capsys):
    model = build(case)
    model.save_pretrained(tmp_path / "bare")
    made_up = AutoTokenizer.from_pretrained(tmp_path / "bare")
    assert not has_files(made_up)
    check_tokens(type(model).from_pretrained(tmp_path / "bare"), tokenizer())
    line = ["prune", str(tmp_path / "bare"), str(tmp_path / "out"), "--width", "mlp=24", "--seq-length", "24"]
    assert main(line) == 2 and "the folder has no tokenizer files" in error_line(capsys)
    made_up.save_pretrained(tmp_path / "bare")
    assert has_files(AutoTokenizer.from_pretrained(tmp_path / "bare"))


def test_save_refuses_a_tokenizer_of_other_tokens_and_writes_nothing(tmp_path):
    model = build("llama-tied")
    model.resize_token_embeddings(100)
    pruner = StructPruner(config())
    pruned = pruner.prune_model(model, tokenizer())
    more, longer = tokenizer(), tokenizer()
    more.add_tokens(["<a>", "<b>"])
    longer.add_tokens([f"<{number}>" for number in range(5)])
    swapped = with_tokens(build("llama-tied"), tokenizer(), ORDER)[1]
    for other, message in ((swapped, ""), (words({"t0": 5}), ""), (longer, ".*resize_token_embeddings")):
        with pytest.raises(StructPruneError, match=f"does not belong to this LlamaForCausalLM{message}"):
            pruner.save(pruned, tmp_path / "out", other)
    assert not [*tmp_path.iterdir()]
    for number, same in enumerate((tokenizer(), more, None)):
        pruner.save(pruned, tmp_path / str(number), same)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "1")) == 98


# --- samples as text: read again by the same tokenizer, and cut inside characters
MODEL, READER = real_text_model()
TEXTS = ["Ann has 3 apples and  5 pears,\n\twhich cost 12 $ each. " * 4, "Then she eats one of them. " * 6] * 2


def samples_of(reader, texts, seq_length=40, num_samples=6):
    return read_heldout(DomainConfig("a", texts), reader, seq_length, num_samples).samples


def test_the_same_tokenizer_reads_the_same_tokens():
    for model, reader, texts in ((MODEL, READER, TEXTS), (build("llama-tied"), tokenizer(), documents(20))):
        samples = samples_of(reader, texts)
        rows = Passages([*samples], reader).rows(reader, model)
        assert torch.stack(rows).equal(samples)
        assert row_losses(model, rows) / 39 == pytest.approx(sample_losses(model, samples), rel=1e-9)


def test_a_character_that_is_cut_is_left_out():
    text = "日本語とé" * 20
    samples = samples_of(READER, [text], seq_length=12)
    passages = Passages([*samples], READER)
    assert len(samples) > 2 and all(piece in text for (piece,) in passages.texts)
    whole = sum(len(READER.decode(row[1:], errors="ignore").replace("\ufffd", "").encode()) for row in samples)
    assert passages.bytes == whole
    assert any(len(row) < 12 for row in passages.rows(READER, MODEL))


def test_rows_of_other_lengths_are_documents_with_eos_between_them():
    samples = samples_of(READER, TEXTS, seq_length=120)
    small, coarse = with_tokens(MODEL, READER, list(range(300)))
    passages = Passages([*samples], READER)
    rows = passages.rows(coarse, small)
    for row, before, texts in zip(rows, samples, passages.texts, strict=True):
        assert row[0] == coarse.bos_token_id and len(row) > len(before)
        assert (row == coarse.eos_token_id).sum() == (before == READER.eos_token_id).sum() == len(texts) - 1
        assert coarse.decode(row[1:]) == READER.decode(before[1:])


def test_text_that_a_model_cannot_read():
    passages = Passages([*samples_of(READER, TEXTS)], READER)
    settings = deepcopy(MODEL.config)
    settings.max_position_embeddings = 30
    with pytest.raises(StructPruneError, match="40 tokens of the model's own .* 30 positions. Use `seq_length=30`"):
        passages.rows(READER, type(MODEL)(settings))
    _, bare = with_tokens(MODEL, READER, list(range(300)))
    bare.bos_token = bare.eos_token = None
    with pytest.raises(StructPruneError, match="neither a BOS nor an EOS token"):
        passages.rows(bare, MODEL)
