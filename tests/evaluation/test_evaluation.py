"""Evaluation: metrics against their definitions, models with other tokenizers, and encoders."""

import json
import shutil
import warnings
from copy import deepcopy
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
from optimum_structprune.measure.losses import means
from optimum_structprune.measure.losses import measure as measure_text
from optimum_structprune.measure.text import Text
from optimum_structprune.system.margins import margin_of_error


MODEL = build("llama-tied", 0)
ORIGINAL = build("llama-tied", 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with text in `a.jsonl`."""
    folder = tmp_path_factory.mktemp("evaluation")
    write_texts(folder / "a.jsonl", documents(40))
    return folder


# --- metrics
@torch.no_grad()
def predicted_log_probs(model, samples):
    """Return the log-probabilities of the next token at each position but the last."""
    return log_softmax(model(samples).logits[:, :-1], dim=-1)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_comparison_equals_its_definition(batch_size):
    samples = token_ids(batch=5, length=60)
    targets = samples[:, 1:].flatten()
    log_probs = predicted_log_probs(MODEL, samples)
    original_log_probs = predicted_log_probs(ORIGINAL, samples)

    measured = measure_text(MODEL, Text(list(samples)), ORIGINAL, tokens=60 * batch_size)

    for losses, predicted in ((measured.loss, log_probs), (measured.other, original_log_probs)):
        expected_loss = float(cross_entropy(predicted.flatten(0, 1), targets))
        assert float(means(losses).mean()) == pytest.approx(expected_loss, rel=1e-5)
    assert means(measured.loss).mean().exp() == pytest.approx(perplexity(MODEL, samples), rel=1e-6)

    expected_divergence = (original_log_probs.exp() * (original_log_probs - log_probs)).sum(-1).mean()
    divergence = float(torch.cat(measured.kl).mean())
    assert divergence == pytest.approx(float(expected_divergence), rel=1e-4)
    assert divergence > 0

    is_same_token = log_probs.argmax(-1) == original_log_probs.argmax(-1)
    assert torch.stack(measured.agrees).equal(is_same_token.double())
    assert not is_same_token.all()


def test_an_evaluation_against_the_original_model_has_all_figures(folder):
    domain = DomainConfig("a", str(folder / "a.jsonl"))
    samples = read_heldout(domain, tokenizer(), 24, 4).samples
    measured = measure_text(MODEL, Text(list(samples)), ORIGINAL)

    evaluation = evaluate(MODEL, tokenizer(), [domain], original=ORIGINAL, seq_length=24, num_samples=4)

    assert evaluation.prefix == "<s>"
    assert "KL" in str(evaluation)
    result = evaluation.domains["a"]
    assert result.tokens == 4 * 23
    assert result.perplexity.values == {
        "original": float(means(measured.other).mean().exp()),
        "pruned": float(means(measured.loss).mean().exp()),
    }
    assert result.divergence.pruned == float(torch.cat(measured.kl).mean())
    assert result.agreement.pruned == float(torch.cat(measured.agrees).mean())


def test_an_evaluation_of_one_model_has_its_perplexity(folder):
    domain = DomainConfig("a", str(folder / "a.jsonl"))
    samples = read_heldout(domain, tokenizer(), 24, 4).samples
    expected_perplexity = perplexity(MODEL, samples)

    domain_fields = {"name": "a", "source": domain.source}
    evaluation = evaluate(MODEL, tokenizer(), [domain_fields], seq_length=24, num_samples=4)

    result = evaluation.domains["a"]
    assert result.perplexity.values == {"pruned": pytest.approx(expected_perplexity, rel=1e-9)}
    assert result.divergence is None
    assert "KL" not in str(evaluation)
    assert str(evaluation).endswith("Samples have 24 tokens, each begins with '<s>'.")


def test_calibration_text_causes_a_warning(tmp_path, folder):
    calibration_domains = [DomainConfig("a", str(folder / "a.jsonl")), DomainConfig("b", documents(40, seed=5))]
    pruner = StructPruner(config(domains=calibration_domains, num_samples=8))
    pruned = pruner.prune_model(build("llama-tied"), tokenizer())
    pruner.save(pruned, tmp_path / "small", tokenizer())
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    same_file = DomainConfig("same", str(folder / "a.jsonl"))
    same_documents = DomainConfig("copy", documents(40))
    other_documents = DomainConfig("other", documents(40, seed=9))

    with pytest.warns(UserWarning, match="calibrated on") as recorded:
        evaluation = evaluate(reloaded, tokenizer(), [same_file, same_documents, other_documents], seq_length=24)

    messages = [str(warning.message) for warning in recorded]
    assert [message for message in messages if "domain" in message] == evaluation.warnings
    assert [warning.split("'")[1] for warning in evaluation.warnings] == ["same", "copy"]
    num_documents = len(pruner.result.manifest.domains[0].documents)
    assert 0 < num_documents < 40
    assert f"{num_documents} of 40 documents were calibrated on" in evaluation.warnings[0]
    assert evaluation.warnings[0] in str(evaluation)

    with pytest.warns(UserWarning, match="calibrated on"):
        evaluate(
            pruned, tokenizer(), [same_documents, other_documents], seq_length=24, manifest=pruner.result.manifest
        )

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert evaluate(reloaded, tokenizer(), [other_documents], seq_length=24).warnings == []


def losses_by_sample(model, samples):
    """Return the loss of each sample, measured one by one."""
    return torch.cat([means(measure_text(model, Text([sample])).loss) for sample in samples])


def test_the_margin_of_a_perplexity_is_the_margin_over_documents():
    domain = DomainConfig("a", documents(90))
    heldout = read_heldout(domain, tokenizer(), 24, 40)
    numbers = document_numbers(heldout.samples, tokenizer().eos_token_id)[:, 0]
    losses = losses_by_sample(MODEL, heldout.samples)
    loss_differences = losses - losses_by_sample(ORIGINAL, heldout.samples)
    options = {"seq_length": 24, "num_samples": 40, "batch_size": 4}

    comparison = evaluate(MODEL, tokenizer(), [domain], original=ORIGINAL, **options)
    single = evaluate(MODEL, tokenizer(), [domain], **options)

    assert comparison.domains["a"].documents == len(numbers.unique())
    assert len(numbers.unique()) <= len(heldout.documents) < 40
    for evaluation, values in ((comparison, loss_differences), (single, losses)):
        expected = float(values.mean().exp()) * margin_of_error(values, numbers)
        assert evaluation.domains["a"].perplexity.margin == pytest.approx(expected, rel=1e-6)
    assert " ± " in str(comparison).splitlines()[1]


def test_a_perplexity_of_one_sample_has_no_margin():
    evaluation = evaluate(MODEL, tokenizer(), [DomainConfig("a", documents(90))], seq_length=24, num_samples=1)

    assert "±" not in str(evaluation).splitlines()[1]


def test_calibration_domains_and_unseen_domains_are_labelled():
    entry = Entry("prose", {"source": "somewhere"}, 1.0, 8, 8, "", "", [], [])
    manifest = Manifest(0, 8, "", {}, [entry])
    domains = [DomainConfig(name, documents(10, seed)) for seed, name in enumerate(("law", "prose", "poems"))]

    evaluation = evaluate(MODEL, tokenizer(), domains, seq_length=24, num_samples=2, manifest=manifest)

    assert evaluation.calibrated == ["prose"]
    labels = [line.split("  ")[0] for line in str(evaluation).splitlines()[1:4]]
    assert labels == [
        "perplexity, law (unseen)",
        "perplexity, prose (calibration domain)",
        "perplexity, poems (unseen)",
    ]


# --- models with different tokenizers
TEXT_MODEL, TEXT_TOKENIZER = real_text_model()
SMALL_MODEL, SMALL_TOKENIZER = with_tokens(TEXT_MODEL, TEXT_TOKENIZER, list(range(300)))
MATH = {"name": "a", "source": "builtin:math"}
MATH_SIZE = {"seq_length": 40, "num_samples": 3}


def compare_with_text_model(model):
    """Compare a model with 300 tokens with the original model, which has 400."""
    return evaluate(
        model, SMALL_TOKENIZER, [MATH], original=TEXT_MODEL, original_tokenizer=TEXT_TOKENIZER, **MATH_SIZE
    )


def test_models_with_different_vocabularies_are_compared_per_token_of_the_original_model():
    samples = read_heldout(DomainConfig(**MATH), TEXT_TOKENIZER, 40, 3).samples
    num_bytes = len("".join(TEXT_TOKENIZER.decode(sample[1:]) for sample in samples).encode())

    evaluation = compare_with_text_model(SMALL_MODEL)

    result = evaluation.domains["a"]
    # The small model lacks tokens of the text, so its predictions differ.
    assert result.divergence.pruned > 1e-2
    # It needs more tokens for the same text.
    perplexities = result.perplexity.values
    assert perplexities["pruned"] > perplexities["original"]

    bits = result.bits_per_byte.values
    for name in ("pruned", "original"):
        assert bits[name] == pytest.approx(log(perplexities[name], 2) * 117 / num_bytes, rel=1e-6)
    assert f"{bits['pruned']:.3f}" in str(evaluation)

    # Without the original model, the perplexity is also per token of the original tokenizer.
    single = evaluate(SMALL_MODEL, SMALL_TOKENIZER, [MATH], original_tokenizer=TEXT_TOKENIZER, **MATH_SIZE)
    assert single.domains["a"].perplexity.values == {"pruned": pytest.approx(perplexities["pruned"])}


def test_a_damaged_model_diverges_further():
    damaged = deepcopy(SMALL_MODEL)
    for parameter in damaged.model.layers.parameters():
        parameter.data.mul_(1.3)

    result = compare_with_text_model(SMALL_MODEL).domains["a"]
    damaged_result = compare_with_text_model(damaged).domains["a"]

    assert damaged_result.divergence.pruned > result.divergence.pruned


def test_unrelated_vocabularies_have_no_divergence():
    original = {"original": build("llama-tied"), "original_tokenizer": tokenizer()}

    evaluation = evaluate(TEXT_MODEL, TEXT_TOKENIZER, [MATH], **original, **MATH_SIZE)

    assert evaluation.domains["a"].divergence is None
    assert "KL" not in str(evaluation)


def test_the_command_evaluates_each_model_with_its_own_tokenizer(tmp_path, capsys):
    original_model = build("llama-tied")
    reversed_order = [0, 1, 2] + list(range(VOCAB - 1, 2, -1))
    renumbered_model, renumbered_tokenizer = with_tokens(original_model, tokenizer(), reversed_order)
    save_with_tokenizer(original_model, tmp_path / "original")
    save_with_tokenizer(renumbered_model, tmp_path / "other", renumbered_tokenizer)
    write_texts(tmp_path / "a.jsonl", documents(20))
    questions = [{"prompt": f"w5 w{number}", "right": "w[0-4]"} for number in range(6, 10)]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, questions)))

    output = tmp_path / "out.json"
    models = [str(tmp_path / "other"), str(tmp_path / "original")]
    options = ["--domain", f"a={tmp_path / 'a.jsonl'}", "--seq-length", "24", "--device", "cpu"]
    options += ["--json", str(output), "--answers", str(tmp_path / "questions.jsonl"), "--max-new-tokens", "4"]

    assert main(["evaluate", models[0], "--against", models[1]] + options) == 0
    evaluation = json.loads(output.read_text())["models"]["pruned"]["evaluation"]
    domain = evaluation["domains"]["a"]
    assert domain["perplexity"]["pruned"] == pytest.approx(domain["perplexity"]["original"], rel=1e-6)
    # The same ids are different tokens, so outputs cannot be compared.
    assert "divergence" not in domain
    assert "agreement" not in domain
    assert len(evaluation["answers"]["questions"]) == 4
    for question in evaluation["answers"]["questions"]:
        first_text, second_text = (answer["text"] for answer in question["answers"].values())
        assert first_text == second_text
        assert second_text != ""

    assert main(["evaluate"] + models + options + ["--overwrite"]) == 0
    measured_models = json.loads(output.read_text())["models"]
    other_domain = measured_models["other"]["evaluation"]["domains"]["a"]
    original_domain = measured_models["original"]["evaluation"]["domains"]["a"]
    for field in ("perplexity", "bits_per_byte"):
        assert other_domain[field]["pruned"] == pytest.approx(original_domain[field]["pruned"], rel=1e-6)

    text = capsys.readouterr().out
    assert f"The vocabularies differ; perplexity is per token of {models[0]}." in text
    assert "bits per byte" in text


# --- encoders
@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    """Return a folder with three encoders, text in `a.jsonl` and pairs of texts in `xx.jsonl`."""
    folder = tmp_path_factory.mktemp("vectors")
    for seed, name in enumerate(("original", "small", "smaller")):
        save_with_tokenizer(build("bert-no-head", seed), folder / name)
    write_texts(folder / "a.jsonl", documents(60))
    pairs = [{"en": text[:40], "xx": text[:40].swapcase()} for text in documents(12)]
    (folder / "xx.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return folder


def compare_encoder(seed, encoders):
    """Compare the vectors of a random encoder with the encoder of seed 0."""
    return evaluate(
        build("bert", seed),
        tokenizer(),
        [DomainConfig("a", str(encoders / "a.jsonl"))],
        original=build("bert", 0),
        seq_length=48,
        pairs=[encoders / "xx.jsonl"],
    )


def test_an_encoder_equals_itself_and_differs_from_another(encoders):
    identical = compare_encoder(0, encoders)
    different = compare_encoder(1, encoders)

    for evaluation in (identical, different):
        assert not evaluation.languages
        assert not evaluation.warnings
        assert all(domain.perplexity is None for domain in evaluation.domains.values())

    identical_text, identical_pairs = identical.domains.values()
    assert identical_text.cosine.pruned == pytest.approx(1)
    assert identical_text.neighbours.pruned == 1
    assert identical_text.retrieval.ratio == identical_pairs.retrieval.ratio == 1
    assert identical_pairs.texts == 24

    different_text, different_pairs = different.domains.values()
    assert different_text.cosine.pruned < 0.99
    assert 0 <= different_text.neighbours.pruned < 1
    assert different_pairs.retrieval.original == identical_pairs.retrieval.original
    assert 0 <= different_pairs.retrieval.pruned <= 1

    assert "cosine, a" in str(different)
    assert "retrieval (mean reciprocal rank), pairs xx" in str(different)


def test_the_command_compares_several_encoders(encoders, capsys, monkeypatch):
    # A different hash for each tokenizer makes the vocabularies differ.
    monkeypatch.setattr(measure, "vocabulary_hash", id)
    (encoders / "more").mkdir()
    # Two of the three files have the same name.
    files = [
        shutil.copy(encoders / "xx.jsonl", encoders / "more" / "xx.jsonl"),
        shutil.copy(encoders / "xx.jsonl", encoders / "more" / "yy.jsonl"),
        encoders / "xx.jsonl",
    ]

    command = ["evaluate", str(encoders / "small"), str(encoders / "smaller"), "--against", str(encoders / "original")]
    command += ["--domain", f"a={encoders / 'a.jsonl'}", "--seq-length", "48"]
    for file in files:
        command += ["--pairs", str(file)]
    command += ["--device", "cpu", "--quiet", "--json"]
    assert main(command) == 0

    record = json.loads(capsys.readouterr().out)
    assert record["notes"] == []
    assert list(record["models"]) == ["original", "small", "smaller"]
    assert "cache_per_token" not in record["models"]["original"]["size"]
    for name in ("small", "smaller"):
        domains = record["models"][name]["evaluation"]["domains"]
        assert list(domains) == ["a", f"pairs {files[0]}", "pairs yy", f"pairs {files[2]}"]
        assert all("texts" in domain for domain in domains.values())


# --- errors
def test_invalid_arguments_are_refused(encoders):
    text = DomainConfig("a", str(encoders / "a.jsonl"))
    llama = build("llama-tied")
    wide_llama = build("llama-tied")
    wide_llama.resize_token_embeddings(100)
    narrow_llama = build("llama-tied")
    narrow_llama.resize_token_embeddings(9)
    defaults = {"domains": [text], "seq_length": 48}

    for model, options, message in (
        (str(encoders), {}, "`model` must be a transformers model, got str"),
        (llama, {"original": str(encoders)}, "`model` must be a transformers model, got str"),
        (llama, {"original_tokenizer": str(encoders)}, "`tokenizer` must be a transformers tokenizer, got str"),
        (llama, {"domains": []}, "nothing to evaluate"),
        (llama, {"domains": [text, text]}, "Two domains are named 'a'"),
        (llama, {"seq_length": 65}, "seq_length=65 is longer than the model's 64 positions"),
        (llama, {"num_samples": 0}, "`num_samples` must be at least 1, got 0"),
        (
            llama,
            {"original": wide_llama},
            "vocabulary of 96, and the original model has one of 100. Pass the original",
        ),
        (narrow_llama, {}, "token id 95, vocabulary 9"),
    ):
        with pytest.raises(StructPruneError, match=message):
            evaluate(model, tokenizer(), **(defaults | options))


def test_invalid_comparisons_of_encoders_are_refused(encoders):
    llama = build("llama-tied")
    bert = build("bert")
    vit = build("vit")
    defaults = {"domains": [DomainConfig("a", str(encoders / "a.jsonl"))], "seq_length": 48}

    for model, options, message in (
        (bert, {}, "BertForMaskedLM does not predict the next token. .* and an original model of the same kind"),
        (bert, {"original": llama}, "BertForMaskedLM does not predict"),
        (llama, {"original": bert}, "BertForMaskedLM does not predict"),
        (bert, {"original": bert, "answers": "builtin"}, "Only its vectors of text can be compared"),
        (vit, {"original": vit}, "ViT.* reads pixel_values, and only models of text can be evaluated"),
    ):
        with pytest.raises(StructPruneError, match=message):
            evaluate(model, tokenizer(), **(defaults | options))


def test_invalid_pairs_are_refused(encoders):
    bert = build("bert")
    domain = DomainConfig("a", str(encoders / "a.jsonl"))
    (encoders / "odd.jsonl").write_text('{"en": "alone"}\n')
    (encoders / "half.jsonl").write_text('["\\ud800", "b"]\n')

    for name, message in (
        ("odd.jsonl", r"odd.jsonl, line \d+, is not a pair of two texts"),
        ("half.jsonl", r"half.jsonl, line 1, is not a pair .*surrogates"),
        ("none.jsonl", "cannot be read"),
    ):
        with pytest.raises(StructPruneError, match=message):
            evaluate(bert, tokenizer(), [domain], original=bert, seq_length=48, pairs=[encoders / name])

    with pytest.raises(StructPruneError, match="pairs are for encoders"):
        evaluate(build("llama-tied"), tokenizer(), [domain], seq_length=48, pairs=["xx.jsonl"])
