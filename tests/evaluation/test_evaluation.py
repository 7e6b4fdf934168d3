"""Evaluation: metrics against their definitions, models of other tokenizers, and encoders."""

import json
import shutil
import warnings
from math import log

import pytest
import torch
from helpers import save_with_tokenizer, with_tokens, write_texts
from models import VOCAB, build, config, documents, real_text_model, token_ids, tokenizer
from torch.nn.functional import cross_entropy, log_softmax
from transformers import AutoModelForCausalLM

from optimum_structprune import DomainConfig, Manifest, StructPruneError, StructPruner, evaluate, perplexity
from optimum_structprune.commands import measure
from optimum_structprune.commands.cli import main
from optimum_structprune.domains.manifest import Entry
from optimum_structprune.domains.packing import document_numbers
from optimum_structprune.evaluation.heldout import read_heldout
from optimum_structprune.forward.metrics import compare, margin_of_error, sample_losses


MODEL, DENSE = build("llama-tied", 0), build("llama-tied", 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluation")
    write_texts(folder / "a.jsonl", documents(40))
    return folder


@pytest.mark.parametrize("batch_size", [1, 3])
def test_comparison_equals_its_definition(batch_size):
    samples = token_ids(batch=5, length=60)
    with torch.no_grad():
        mine, theirs = (log_softmax(one(samples).logits[:, :-1], dim=-1) for one in (MODEL, DENSE))
    targets = samples[:, 1:].flatten()
    losses, (far, agreement) = compare(MODEL, DENSE, samples, batch_size)
    for of, predicted in ((losses["model"], mine), (losses["dense"], theirs)):
        assert float(of.mean()) == pytest.approx(float(cross_entropy(predicted.flatten(0, 1), targets)), rel=1e-5)
    assert far == pytest.approx(float((theirs.exp() * (theirs - mine)).sum(-1).mean()), rel=1e-4)
    assert agreement == pytest.approx(float((mine.argmax(-1) == theirs.argmax(-1)).float().mean()))
    assert losses["model"].mean().exp() == pytest.approx(perplexity(MODEL, samples), rel=1e-6)
    assert far > 0 and agreement < 1


def test_evaluate(folder):
    domain = DomainConfig("a", str(folder / "a.jsonl"))
    found = evaluate(MODEL, tokenizer(), [domain], dense=DENSE, seq_length=24, num_samples=4)
    losses, close = compare(MODEL, DENSE, read_heldout(domain, tokenizer(), 24, 4).samples)
    domain_result = found.domains["a"]
    assert domain_result.tokens == 4 * 23 and found.prefix == "<s>"
    both = {name: float(of.mean().exp()) for name, of in losses.items()}
    assert domain_result.perplexity.by_model() == {"dense": both["dense"], "pruned": both["model"]}
    assert (domain_result.divergence.pruned, domain_result.agreement.pruned) == close
    alone = evaluate(MODEL, tokenizer(), [{"name": "a", "source": domain.source}], seq_length=24, num_samples=4)
    assert alone.domains["a"].perplexity.by_model() == {"pruned": pytest.approx(both["model"], rel=1e-9)}
    assert alone.domains["a"].divergence is None and "KL" not in str(alone) and "KL" in str(found)
    assert str(alone).endswith("Samples have 24 tokens, each begins with '<s>'.")


def test_text_that_was_calibrated_on_is_called_out(tmp_path, folder):
    calibrated = [DomainConfig("a", str(folder / "a.jsonl")), DomainConfig("b", documents(40, seed=5))]
    pruner = StructPruner(config(domains=calibrated, num_samples=8))
    pruned = pruner.prune_model(build("llama-tied"), tokenizer())
    pruner.save(pruned, tmp_path / "small", tokenizer())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    domains = {"same": str(folder / "a.jsonl"), "copy": documents(40), "other": documents(40, seed=9)}
    named = [DomainConfig(name, source) for name, source in domains.items()]
    with pytest.warns(UserWarning, match="calibrated on") as caught:
        found = evaluate(model, tokenizer(), named, seq_length=24)
    assert [str(one.message) for one in caught if "domain" in str(one.message)] == found.warnings
    assert [warning.split("'")[1] for warning in found.warnings] == ["same", "copy"]
    used = len(pruner.manifest.domains[0].documents)
    assert 0 < used < 40 and f"{used} of 40 documents were calibrated on" in found.warnings[0]
    assert found.warnings[0] in str(found)
    with pytest.warns(UserWarning, match="calibrated on"):
        evaluate(pruned, tokenizer(), named[1:], seq_length=24, manifest=pruner.manifest)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert evaluate(model, tokenizer(), named[2:], seq_length=24).warnings == []


def test_margins_of_perplexities_are_those_of_the_documents():
    domain = DomainConfig("a", documents(90))
    found = evaluate(MODEL, tokenizer(), [domain], dense=DENSE, seq_length=24, num_samples=40, batch_size=4)
    heldout = read_heldout(domain, tokenizer(), 24, 40)
    samples, numbers = heldout.samples, document_numbers(heldout.samples, tokenizer().eos_token_id)[:, 0]
    assert found.domains["a"].documents == len(numbers.unique()) <= len(heldout.documents) < 40
    mine, theirs = (torch.stack([sample_losses(one, row[None])[0] for row in samples]) for one in (MODEL, DENSE))
    alone = evaluate(MODEL, tokenizer(), [domain], seq_length=24, num_samples=40, batch_size=4)
    for result, losses in ((found, mine - theirs), (alone, mine)):
        expected = float(losses.mean().exp()) * margin_of_error(losses, numbers)
        assert result.domains["a"].perplexity.margin == pytest.approx(expected, rel=1e-6)
    assert " ± " in str(found).splitlines()[1]
    assert "±" not in str(evaluate(MODEL, tokenizer(), [domain], seq_length=24, num_samples=1)).splitlines()[1]


def test_calibrated_kinds_stand_apart():
    manifest = Manifest(0, 8, "", {}, [Entry("prose", {"source": "somewhere"}, 1.0, 8, 8, "", "", [], [])])
    domains = [DomainConfig(name, documents(10, seed)) for seed, name in enumerate(("law", "prose", "poems"))]
    found = evaluate(build("llama-tied"), tokenizer(), domains, seq_length=24, num_samples=2, manifest=manifest)
    assert found.calibrated == ["prose"]
    labels = [line.split("  ")[0] for line in str(found).splitlines()[1:4]]
    kinds = ["law (unseen)", "prose (calibration domain)", "poems (unseen)"]
    assert labels == [f"perplexity, {kind}" for kind in kinds]


def test_a_part_of_the_vocabulary():
    model, reader = real_text_model()
    domain, size = {"name": "a", "source": "builtin:math"}, {"seq_length": 40, "num_samples": 3}
    small, coarse = with_tokens(model, reader, list(range(300)))
    both = {"dense": model, "dense_tokenizer": reader, **size}
    found = evaluate(small, coarse, [domain], **both)
    assert (
        found.domains["a"].divergence.pruned > 1e-2
    )  # it knows the dense model's words less well, whose tokens it has lost
    ppl, bits = (found.domains["a"].perplexity.by_model(), found.domains["a"].bits_per_byte.by_model())
    assert ppl["pruned"] > ppl["dense"]  # it spells words in more tokens
    text = "".join(reader.decode(row[1:]) for row in read_heldout(DomainConfig(**domain), reader, 40, 3).samples)
    for which in ("pruned", "dense"):
        assert bits[which] == pytest.approx(log(ppl[which], 2) * 117 / len(text.encode()), rel=1e-6)
    assert f"{bits['pruned']:.3f}" in str(found)
    # Per token of the same tokenizer without the dense model too, and closer to it than another model is.
    alone = evaluate(small, coarse, [domain], dense_tokenizer=reader, **size)
    assert alone.domains["a"].perplexity.by_model() == {"pruned": pytest.approx(ppl["pruned"])}
    for parameter in small.model.layers.parameters():
        parameter.data.mul_(1.3)
    damaged = evaluate(small, coarse, [domain], **both)
    assert damaged.domains["a"].divergence.pruned > found.domains["a"].divergence.pruned
    # Where vocabularies have little in common, outputs cannot be compared.
    found = evaluate(model, reader, [domain], dense=build("llama-tied"), dense_tokenizer=tokenizer(), **size)
    assert found.domains["a"].divergence is None and "KL" not in str(found)


def test_the_command_reads_another_vocabulary_with_its_own_tokenizer(tmp_path, capsys):
    dense = build("llama-tied")
    save_with_tokenizer(dense, tmp_path / "dense")
    other, renumbered = with_tokens(dense, tokenizer(), [0, 1, 2, *range(VOCAB - 1, 2, -1)])
    save_with_tokenizer(other, tmp_path / "other", renumbered)
    write_texts(tmp_path / "a.jsonl", documents(20))
    questions = ({"prompt": f"w5 w{number}", "right": "w[0-4]"} for number in range(6, 10))
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, questions)))
    models = [str(tmp_path / "other"), str(tmp_path / "dense")]
    line = ["--domain", f"a={tmp_path / 'a.jsonl'}", "--seq-length", "24", "--device", "cpu", "--json"]
    line += [str(tmp_path / "out.json"), "--answers", str(tmp_path / "questions.jsonl"), "--max-new-tokens", "4"]
    assert main(["evaluate", models[0], "--against", models[1], *line]) == 0
    found = json.loads((tmp_path / "out.json").read_text())
    evaluation = found["models"]["pruned"]["evaluation"]
    domain = evaluation["domains"]["a"]
    assert domain["perplexity"]["pruned"] == pytest.approx(domain["perplexity"]["dense"], rel=1e-6)
    assert not {"divergence", "agreement"} & domain.keys()  # by the same ids they mean other tokens
    texts = [[of["text"] for of in item["answers"].values()] for item in evaluation["answers"]["questions"]]
    assert len(texts) == 4 and all(dense == model != "" for dense, model in texts)
    assert main(["evaluate", *models, *line, "--overwrite"]) == 0
    record = json.loads((tmp_path / "out.json").read_text())
    for field in ("perplexity", "bits_per_byte"):
        first, second = (
            record["models"][name]["evaluation"]["domains"]["a"][field]["pruned"] for name in ("other", "dense")
        )
        assert first == pytest.approx(second, rel=1e-6)
    shown = capsys.readouterr().out
    assert f"The vocabularies differ; perplexity is per token of {models[0]}." in shown and "bits per byte" in shown


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vectors")
    for seed, name in enumerate(("dense", "small", "smaller")):
        save_with_tokenizer(build("bert-no-head", seed), folder / name)
    write_texts(folder / "a.jsonl", documents(60))
    pairs = ({"en": text[:40], "xx": text[:40].swapcase()} for text in documents(12))
    (folder / "xx.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return folder


def test_an_encoder_is_its_own_equal_and_another_is_not(encoders):
    text, pairs, figures = DomainConfig("a", str(encoders / "a.jsonl")), [encoders / "xx.jsonl"], []
    fields = {"dense": build("bert", 0), "seq_length": 48, "pairs": pairs}
    for seed in (0, 1):
        found = evaluate(build("bert", seed), tokenizer(), [text], **fields)
        assert not found.languages and not found.warnings
        assert all(domain.perplexity is None for domain in found.domains.values())
        figures.append({name: domain.vectors for name, domain in found.domains.items()})
    (same, pairs), (other, other_pairs) = (of.values() for of in figures)
    assert same.cosine.pruned == pytest.approx(1) and same.neighbours.pruned == 1
    assert other.cosine.pruned < 0.99 and 0 <= other.neighbours.pruned < 1
    assert pairs.retrieval.dense == pairs.retrieval.pruned == other_pairs.retrieval.dense
    assert 0 <= other_pairs.retrieval.pruned <= 1 and pairs.texts == 24
    assert "cosine, a" in str(found) and "translations found, pairs xx" in str(found)


def test_the_command_shows_several_encoders_side_by_side(encoders, capsys, monkeypatch):
    monkeypatch.setattr(measure, "vocabulary_hash", id)  # as if each had tokens of its own
    line = ["evaluate", str(encoders / "small"), str(encoders / "smaller"), "--against", str(encoders / "dense")]
    (encoders / "more").mkdir()
    files = [shutil.copy(encoders / "xx.jsonl", encoders / "more" / name) for name in ("xx.jsonl", "yy.jsonl")]
    files += [str(encoders / "xx.jsonl")]  # of a name that another one has
    line += ["--domain", f"a={encoders / 'a.jsonl'}", "--seq-length", "48"]
    line += [word for file in files for word in ("--pairs", str(file))]
    assert main([*line, "--device", "cpu", "--quiet", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert "cache_per_token" not in values["models"]["dense"]["size"] and values["notes"] == []
    assert [*values["models"]] == ["dense", "small", "smaller"]
    for name in ("small", "smaller"):
        domains = values["models"][name]["evaluation"]["domains"]
        assert [*domains] == ["a", f"pairs {files[0]}", "pairs yy", f"pairs {files[2]}"]
        assert all("vectors" in domain for domain in domains.values())


def test_what_evaluate_refuses(encoders):
    text, bert, other = DomainConfig("a", str(encoders / "a.jsonl")), build("bert"), build("llama-tied")
    wide, narrow = build("llama-tied"), build("llama-tied")
    wide.resize_token_embeddings(100)
    narrow.resize_token_embeddings(9)
    (encoders / "odd.jsonl").write_text('{"en": "alone"}\n')
    (encoders / "half.jsonl").write_text('["\\ud800", "b"]\n')
    for model, fields, message in (
        (str(encoders), {}, "`model` must be a transformers model, got str"),
        (other, {"dense": str(encoders)}, "`model` must be a transformers model, got str"),
        (other, {"dense_tokenizer": str(encoders)}, "`tokenizer` must be a transformers tokenizer, got str"),
        (other, {"domains": []}, "nothing to evaluate"),
        (other, {"domains": [text, text]}, "Two domains are named 'a'"),
        (other, {"seq_length": 65}, "seq_length=65 is longer than the model's 64 positions"),
        (other, {"num_samples": 0}, "`num_samples` must be at least 1, got 0"),
        (other, {"dense": wide}, "vocabulary of 96, and the dense model has one of 100. Pass the dense"),
        (narrow, {}, "token id 95, vocabulary 9"),
        (bert, {}, "BertForMaskedLM does not predict the next token. .* and a dense model of the same kind"),
        (bert, {"dense": other}, "BertForMaskedLM does not predict"),
        (other, {"dense": bert}, "BertForMaskedLM does not predict"),
        (bert, {"dense": bert, "answers": "builtin"}, "Only its vectors of text can be compared"),
        (build("vit"), {"dense": build("vit")}, "ViT.* reads pixel_values, and only models of text can be evaluated"),
        (other, {"pairs": ["xx.jsonl"]}, "pairs are for encoders"),
        (bert, {"dense": bert, "pairs": [encoders / "odd.jsonl"]}, r"odd.jsonl, line \d+, is no pair of two texts"),
        (bert, {"dense": bert, "pairs": [encoders / "half.jsonl"]}, r"half.jsonl, line 1, is no pair .*surrogates"),
        (bert, {"dense": bert, "pairs": [encoders / "none.jsonl"]}, "cannot be read"),
    ):
        with pytest.raises(StructPruneError, match=message):
            evaluate(model, tokenizer(), **{"domains": [text], "seq_length": 48, **fields})
