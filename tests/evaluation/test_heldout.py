"""Held-out text of an evaluation: the beginning of a file in samples, and too little text."""

import pytest
from helpers import write_texts
from models import documents, tokenizer

from optimum_structprune import DomainConfig, StructPruneError
from optimum_structprune.evaluation.heldout import read_heldout


def test_held_out_text_is_the_beginning_of_the_file(tmp_path):
    word_tokenizer = tokenizer()
    texts = documents(40)
    domain = DomainConfig("a", str(write_texts(tmp_path / "a.jsonl", texts)))
    tokens = []
    for text in texts:
        if tokens:
            tokens.append(word_tokenizer.eos_token_id)
        tokens += word_tokenizer(text, add_special_tokens=False)["input_ids"]
    num_samples = len(tokens) // 23

    heldout = read_heldout(domain, word_tokenizer, seq_length=24)

    assert heldout.samples.shape == (num_samples, 24)
    assert len(heldout.documents) == len(texts)
    assert set(heldout.samples[:, 0].tolist()) == {word_tokenizer.bos_token_id}
    assert heldout.samples[:, 1:].flatten().tolist() == tokens[: num_samples * 23]

    beginning = read_heldout(domain, word_tokenizer, seq_length=24, num_samples=3)
    assert beginning.samples.equal(heldout.samples[:3])
    assert 1 < len(beginning.documents) < 10
    assert beginning.documents == heldout.documents[: len(beginning.documents)]


def test_unusable_text_is_refused():
    for source, seq_length, message in (
        ("user/name", 24, "'a' .user/name. has no known end"),
        ([], 24, "'a' is empty"),
        (["w5 w6"], 24, "has 2 tokens, and a sample takes 23"),
        (["w5 w6"], 1, "must be at least 2"),
        ("none.jsonl", 24, "the file or folder none.jsonl does not exist. A relative path starts at /.*"),
    ):
        with pytest.raises(StructPruneError, match=message):
            read_heldout(DomainConfig("a", source), tokenizer(), seq_length)
