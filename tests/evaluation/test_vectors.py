"""Evaluation of encoders: the same figures as the report's, pairs, and what is refused."""

import json

import pytest
from helpers import save_with_tokenizer, write_texts
from models import build, documents, tokenizer

from optimum_structprune import DomainConfig, StructPruneError, evaluate
from optimum_structprune.commands.cli import main


PAIRS = [{"en": text[:40], "xx": text[:40].swapcase()} for text in documents(12)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vectors")
    for seed, name in enumerate(("dense", "small", "smaller")):
        save_with_tokenizer(build("bert-no-head", seed), folder / name)
    write_texts(folder / "a.jsonl", documents(60))
    (folder / "xx.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    return folder


def test_an_encoder_is_its_own_equal_and_another_is_not(folder):
    text, dense = DomainConfig("a", str(folder / "a.jsonl")), build("bert", 0)
    figures = []
    for seed in (0, 1):
        found = evaluate(
            build("bert", seed), tokenizer(), [text], dense=dense, seq_length=48, pairs=[folder / "xx.jsonl"]
        )
        assert not found.perplexity and not found.languages and not found.warnings
        figures.append(found.embeddings)
    (same, pairs), (other, other_pairs) = (of.values() for of in figures)
    assert same["model"]["cosine"] == pytest.approx(1) and same["model"]["neighbours"] == 1
    assert other["model"]["cosine"] < 0.99 and 0 <= other["model"]["neighbours"] < 1
    assert pairs["dense"]["retrieval"] == pairs["model"]["retrieval"] == other_pairs["dense"]["retrieval"]
    assert 0 <= other_pairs["model"]["retrieval"] <= 1 and pairs["model"]["texts"] == 24
    assert "cosine a" in str(found) and "translations found pairs xx" in str(found)


def test_the_command_shows_several_encoders_side_by_side(folder, capsys):
    line = ["evaluate", str(folder / "small"), str(folder / "smaller"), "--against", str(folder / "dense")]
    line += ["--domain", f"a={folder / 'a.jsonl'}", "--pairs", str(folder / "xx.jsonl"), "--seq-length", "48"]
    assert main([*line, "--device", "cpu", "--quiet", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert "cache_per_token" not in values
    assert [*values["embeddings"]["a"]] == [*values["embeddings"]["pairs xx"]] == ["dense", "small", "smaller"]


def test_what_is_refused_of_encoders(folder):
    text, bert, other = DomainConfig("a", str(folder / "a.jsonl")), build("bert"), build("llama-tied")
    (folder / "odd.jsonl").write_text('{"en": "alone"}\n')
    for model, fields, message in (
        (bert, {}, "BertForMaskedLM does not predict the next token: its vectors .* compared with those of the dense"),
        (bert, {"dense": other}, "BertForMaskedLM does not predict"),
        (other, {"dense": bert}, "BertForMaskedLM does not predict"),
        (bert, {"dense": bert, "answers": "builtin"}, "and nothing else"),
        (build("vit"), {"dense": build("vit")}, "ViT.* its vectors of text"),
        (other, {"pairs": ["xx.jsonl"]}, "pairs are for encoders"),
        (bert, {"dense": bert, "pairs": [folder / "odd.jsonl"]}, r"odd.jsonl, line \d+, is no pair of two texts"),
        (bert, {"dense": bert, "pairs": [folder / "none.jsonl"]}, "cannot be read"),
    ):
        with pytest.raises(StructPruneError, match=message):
            evaluate(model, tokenizer(), [text], seq_length=48, **fields)
