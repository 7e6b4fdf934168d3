"""Samples as text: read again by the same tokenizer, and cut inside characters."""

from types import SimpleNamespace

import pytest
import torch
from helpers import with_tokens
from models import build, documents, real_text_model, tokenizer

from optimum_structprune import DomainConfig, StructPruneError
from optimum_structprune.domains.packing import Passages
from optimum_structprune.evaluation.heldout import read_heldout
from optimum_structprune.forward.metrics import row_losses, sample_losses


@pytest.fixture(scope="module")
def real():
    return real_text_model()


def samples_of(reader, texts, seq_length=40, num_samples=6):
    return read_heldout(DomainConfig("a", texts), reader, seq_length, num_samples).samples


TEXTS = ["Ann has 3 apples and  5 pears,\n\twhich cost 12 $ each. " * 4, "Then she eats one of them. " * 6] * 2


def test_the_same_tokenizer_reads_the_same_tokens(real):
    model, reader = real
    for model, reader, texts in ((*real, TEXTS), (build("llama-tied"), tokenizer(), documents(20))):
        samples = samples_of(reader, texts)
        rows = Passages([*samples], reader).rows(reader, model)
        assert torch.stack(rows).equal(samples)
        assert row_losses(model, rows) / 39 == pytest.approx(sample_losses(model, samples), rel=1e-9)


def test_a_character_that_is_cut_is_left_out(real):
    model, reader = real
    text = "日本語とé" * 20
    samples = samples_of(reader, [text], seq_length=12)
    passages = Passages([*samples], reader)
    assert len(samples) > 2 and all(piece in text for (piece,) in passages.texts)
    whole = sum(len(reader.decode(row[1:], errors="ignore").replace("\ufffd", "").encode()) for row in samples)
    assert passages.bytes == whole
    assert any(len(row) < 12 for row in passages.rows(reader, model))


def test_rows_of_other_lengths_are_documents_with_eos_between_them(real):
    model, reader = real
    samples = samples_of(reader, TEXTS, seq_length=120)
    small, coarse = with_tokens(model, reader, list(range(300)))
    passages = Passages([*samples], reader)
    rows = passages.rows(coarse, small)
    for row, before, texts in zip(rows, samples, passages.texts, strict=True):
        assert row[0] == coarse.bos_token_id and len(row) > len(before)
        assert (row == coarse.eos_token_id).sum() == (before == reader.eos_token_id).sum() == len(texts) - 1
        assert coarse.decode(row[1:]) == reader.decode(before[1:])


def test_text_that_a_model_cannot_read(real):
    model, reader = real
    passages = Passages([*samples_of(reader, TEXTS)], reader)
    short = SimpleNamespace(vocab_size=len(reader), max_position_embeddings=30)
    with pytest.raises(StructPruneError, match="40 tokens of the model's own .* 30 positions; try seq_length=30"):
        passages.rows(reader, SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: short)))
    _, bare = with_tokens(model, reader, list(range(300)))
    bare.bos_token = bare.eos_token = None
    with pytest.raises(StructPruneError, match="neither a BOS nor an EOS token"):
        passages.rows(bare, model)
