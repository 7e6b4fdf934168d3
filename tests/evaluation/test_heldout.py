"""Models of different tokenizers on the same text: in evaluation and in the commands."""

import json
from math import log

import pytest
import torch
from helpers import save_with_tokenizer, with_tokens, write_texts
from models import VOCAB, build, documents, real_text_model, tokenizer

from optimum_structprune import DomainConfig, evaluate
from optimum_structprune.commands.cli import main
from optimum_structprune.evaluation.heldout import read_heldout


ORDER = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(0)).tolist()
TEXT = {"name": "a", "source": "builtin:math"}
SIZE = {"seq_length": 40, "num_samples": 3}


@pytest.fixture(scope="module")
def real():
    return real_text_model()


def test_a_part_of_the_vocabulary(real):
    model, reader = real
    small, coarse = with_tokens(model, reader, list(range(300)))
    both = {"dense": model, "dense_tokenizer": reader, **SIZE}
    found = evaluate(small, coarse, [TEXT], **both)
    assert found.divergence["a"] > 1e-2  # it knows the dense model's words less well, whose tokens it has lost
    ppl, bits = found.perplexity["a"], found.bits_per_byte["a"]
    assert ppl["model"] > ppl["dense"]  # it spells words in more tokens
    text = "".join(reader.decode(row[1:]) for row in read_heldout(DomainConfig(**TEXT), reader, 40, 3).samples)
    for which in ("model", "dense"):
        assert bits[which] == pytest.approx(log(ppl[which], 2) * 117 / len(text.encode()), rel=1e-6)
    assert f"{bits['model']:.3f}" in str(found)
    # Per token of the same tokenizer without the dense model too, and closer to it than another model is.
    alone = evaluate(small, coarse, [TEXT], dense_tokenizer=reader, **SIZE)
    assert alone.perplexity["a"] == {"model": pytest.approx(ppl["model"])}
    for parameter in small.model.layers.parameters():
        parameter.data.mul_(1.3)
    assert evaluate(small, coarse, [TEXT], **both).divergence["a"] > found.divergence["a"]
    # Where vocabularies have little in common, outputs cannot be compared.
    found = evaluate(*real, [TEXT], dense=build("llama-tied"), dense_tokenizer=tokenizer(), **SIZE)
    assert found.divergence == {} and "KL" not in str(found)


def test_the_commands(tmp_path, capsys):
    dense = build("llama-tied")
    save_with_tokenizer(dense, tmp_path / "dense")
    other, renumbered = with_tokens(dense, tokenizer(), ORDER)
    save_with_tokenizer(other, tmp_path / "other", renumbered)
    write_texts(tmp_path / "a.jsonl", documents(20))
    questions = ({"prompt": f"w5 w{number}", "right": "w[0-4]"} for number in range(6, 10))
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, questions)))
    models = [str(tmp_path / "other"), str(tmp_path / "dense")]
    line = ["--domain", f"a={tmp_path / 'a.jsonl'}", "--seq-length", "24", "--device", "cpu", "--json"]
    line += [str(tmp_path / "out.json"), "--answers", str(tmp_path / "questions.jsonl"), "--max-new-tokens", "4"]
    assert main(["evaluate", models[0], "--against", models[1], *line]) == 0
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["perplexity"]["a"]["model"] == pytest.approx(found["perplexity"]["a"]["dense"], rel=1e-6)
    assert found["divergence"] == found["agreement"] == {}  # by the same ids they mean other tokens
    assert [(of["difference"], of["items"]) for of in found["paired"].values()] == [(0, 4)] * 3
    texts = [[of["text"] for of in item["answers"].values()] for item in found["answers"]]
    assert len(texts) == 4 and all(dense == model != "" for dense, model in texts)
    assert main(["evaluate", *models, *line, "--overwrite"]) == 0
    record = json.loads((tmp_path / "out.json").read_text())
    for field in ("perplexity", "bits_per_byte"):
        assert record[field]["a"]["other"] == pytest.approx(record[field]["a"]["dense"], rel=1e-6)
    shown = capsys.readouterr().out
    assert f"vocabularies differ: perplexity is per token of {models[0]}" in shown and "bits per byte" in shown
