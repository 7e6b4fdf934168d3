"""Held-out text that an evaluation reads: the beginning of a file in samples, and what is too little."""

import pytest
from helpers import write_texts
from models import documents, tokenizer

from optimum_structprune import DomainConfig, StructPruneError
from optimum_structprune.evaluation.heldout import read_heldout


def test_held_out_text_is_the_beginning_of_the_file(tmp_path):
    reader, texts = tokenizer(), documents(40)
    domain = DomainConfig("a", str(write_texts(tmp_path / "a.jsonl", texts)))
    tokens = []
    for text in texts:
        tokens += [*([reader.eos_token_id] if tokens else []), *reader(text, add_special_tokens=False)["input_ids"]]
    whole = read_heldout(domain, reader, seq_length=24)
    assert whole.samples.shape == (len(tokens) // 23, 24) and len(whole.documents) == len(texts)
    assert whole.samples[:, 1:].flatten().tolist() == tokens[: len(tokens) // 23 * 23]
    assert set(whole.samples[:, 0].tolist()) == {reader.bos_token_id}
    first = read_heldout(domain, reader, seq_length=24, num_samples=3)
    assert first.samples.equal(whole.samples[:3]) and 1 < len(first.documents) < 10
    assert first.documents == whole.documents[: len(first.documents)]


def test_text_that_does_not_do():
    for source, fields, message in (
        ("user/name", {}, "'a' .user/name. has no known end"),
        ([], {}, "'a' is empty"),
        (["w5 w6"], {}, "has 2 tokens, and a sample takes 23"),
        (["w5 w6"], {"seq_length": 1}, "must be at least 2"),
        ("none.jsonl", {}, "the file or folder none.jsonl does not exist"),
    ):
        with pytest.raises(StructPruneError, match=message):
            read_heldout(DomainConfig("a", source), tokenizer(), **{"seq_length": 24, **fields})
