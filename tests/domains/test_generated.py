"""Calibration text that the model generates itself."""

import itertools
import json
import logging
import shutil
from dataclasses import replace
from unittest.mock import MagicMock, Mock

import pytest
import torch
from models import build, config, real_text_model, tokenizer
from trained import needs_shared, stories_model
from transformers import GenerationConfig

from optimum_structprune import DomainConfig, StructPruneConfig, StructPruneError, StructPruner
from optimum_structprune.config.fields import read_yaml
from optimum_structprune.domains import generated, load
from optimum_structprune.domains.generated import self_documents
from optimum_structprune.domains.load import can_write, load_domains, texts_of, with_written_text
from optimum_structprune.domains.manifest import CALIBRATED
from optimum_structprune.system.fingerprint import fingerprint


GENERATOR = real_text_model()
MODEL, TOKENIZER = GENERATOR


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Return the folder of generated documents, and make documents and batches small."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path))
    for name, number in {"FIRST_BATCH": 4, "MAX_BATCH": 8, "MAX_TOKENS": 24, "MIN_TOKENS": 8}.items():
        monkeypatch.setattr(generated, name, number)
    return tmp_path / "structprune"


def first_documents(generator, count, name="any", seed=0):
    """Return the first documents that a model generates with its tokenizer."""
    model, tokenizer = generator
    tokens = round(count * generated.EXPECTED_SHARE * generated.MAX_TOKENS)
    documents = self_documents(model, tokenizer, name, seed, tokens)
    return list(itertools.islice(documents, count))


def config_with_generated_text():
    """Return a config with one generated and one built-in domain."""
    domains = [DomainConfig("own", "self:any"), DomainConfig("other", "builtin:math")]
    return StructPruneConfig(widths={"mlp": 1024}, domains=domains, num_samples=4, seq_length=32)


def test_unseen_text_continues_openings():
    texts = first_documents(GENERATOR, 12, "other")

    openings = []
    for kind in read_yaml(generated.OPENINGS).values():
        for form in kind["begin"]:
            openings += [form.replace("{topic}", topic) for topic in kind["topics"]]
    assert len(set(texts)) == 12
    for text in texts:
        assert text.startswith(tuple(openings))
        assert text not in openings


def test_text_of_any_kind_begins_with_a_word_of_the_vocabulary():
    words = generated.vocabulary_words(TOKENIZER)

    texts = first_documents(GENERATOR, len(words), "any")

    first_words = set()
    for text in texts:
        first_words.add(max(filter(text.startswith, words), key=len))
    assert len(first_words) > len(words) / 2
    assert first_documents(GENERATOR, 8, "any", seed=1) != texts


def test_a_vocabulary_without_capitals_uses_all_its_tokens():
    tokens = ["<s>", "a", " ", "ing", "1"]
    tokenizer = MagicMock(all_special_ids=(0,), decode=lambda ids: tokens[ids[0]])
    tokenizer.__len__.return_value = len(tokens)

    assert generated.vocabulary_words(tokenizer) == ["1", "a", "ing"]


def test_generated_text_is_read_from_the_cache_and_continued(cache, monkeypatch):
    generated_at_once = first_documents(GENERATOR, 30)
    shutil.rmtree(cache)
    short = first_documents(GENERATOR, 13)

    batch_sizes = []
    generate = type(MODEL).generate

    def recorded_generate(*args, **options):
        batch_sizes.append(len(args[1]))
        return generate(*args, **options)

    monkeypatch.setattr(type(MODEL), "generate", recorded_generate)
    assert first_documents(GENERATOR, 13) == short
    assert batch_sizes == []

    # The number of documents changes only the last batch, and the first batch is in the cache.
    longer = first_documents(GENERATOR, 30)
    assert longer == generated_at_once
    assert longer[:5] == short[:5]
    assert batch_sizes[0] == 8
    assert sum(batch_sizes) < 30


def test_likely_tokens_are_sampled_by_their_probability():
    probabilities = torch.tensor([0.5, 0.3, 0.19, 0.009, 0.001]).repeat(4000, 1)
    probabilities[1::2] = probabilities[1::2].flip(1)
    torch.manual_seed(0)

    tokens = generated.sample_min_p(probabilities.log() + 7)

    assert tokens.shape == (4000, 1)
    for rows, expected in ((tokens[::2], probabilities[0]), (tokens[1::2], probabilities[1])):
        counts = rows.flatten().bincount(minlength=5) / len(rows)
        likely = expected >= generated.MIN_P * expected.max()
        assert (counts[~likely] == 0).all()
        torch.testing.assert_close(counts[likely], expected[likely] / expected[likely].sum(), atol=0.03, rtol=0)


def test_damaged_and_incomplete_lines_of_the_cache_are_generated_again(cache):
    texts = first_documents(GENERATOR, 6)
    (file,) = cache.iterdir()
    content = file.read_bytes()

    for damaged in (b"\x00\xff damaged\n" + content[:-9], content[: len(content) // 2]):
        file.write_bytes(damaged)
        assert first_documents(GENERATOR, 6) == texts
        assert first_documents(GENERATOR, 6) == texts


def test_a_repeated_prompt_has_different_documents(monkeypatch):
    monkeypatch.setattr(generated, "vocabulary_words", lambda tokenizer: ["Problem: "])

    texts = first_documents(GENERATOR, 12)

    assert len(set(texts)) == 12
    assert all(text.startswith("Problem: ") for text in texts)


def test_each_model_and_setting_has_its_own_cache_file(cache, monkeypatch):
    first_documents(GENERATOR, 1)

    changed_model, _ = real_text_model()
    with torch.no_grad():
        changed_model.get_input_embeddings().weight[3, 3] += 0.01
    first_documents((changed_model, TOKENIZER), 1)

    monkeypatch.setattr(generated, "MIN_P", 0.1)
    first_documents(GENERATOR, 1)

    end_of_text = GenerationConfig(eos_token_id=[7])
    monkeypatch.setattr(MODEL, "generation_config", end_of_text)
    first_documents(GENERATOR, 1)

    assert len(list(cache.iterdir())) == 4


def generate_tokens(model, rows, monkeypatch):
    """Make a model generate these rows of tokens. A batch with more prompts repeats the rows."""
    steps = itertools.count()
    padding = [model.config.eos_token_id] * generated.MAX_TOKENS
    padded_rows = [row + padding for row in rows]

    def sample(scores, min_p):
        position = next(steps) % generated.MAX_TOKENS
        column = itertools.cycle([row[position] for row in padded_rows])
        tokens = list(itertools.islice(column, len(scores)))
        return torch.tensor(tokens).unsqueeze(1)

    monkeypatch.setattr(generated, "sample_min_p", sample)


@pytest.mark.parametrize("ids", [[5, 6] * 8, list(range(5, 11))], ids=["repeats itself", "short"])
def test_repetitive_and_short_documents_are_dropped(ids, monkeypatch):
    generate_tokens(MODEL, [ids], monkeypatch)

    with pytest.raises(StructPruneError, match="self:any: the last 120 documents of the model are too short"):
        first_documents(GENERATOR, 1)


@needs_shared
def test_unlikely_text_is_dropped(cache, monkeypatch):
    model, stories_tokenizer = stories_model()
    story = "Once upon a time there was a little girl named Lily. She loved to play outside in the big park"
    rows = [stories_tokenizer(f"{story} with her {pet}.")["input_ids"] for pet in ("dog", "cat", "friends")]
    noise = torch.randperm(400, generator=torch.Generator().manual_seed(0))[:30].add(50).tolist()
    rows.append(noise)
    generate_tokens(model, rows, monkeypatch)

    texts = first_documents((model, stories_tokenizer), 3)

    assert all("Lily" in text for text in texts)
    (path,) = cache.iterdir()
    first_line = path.read_text().strip().splitlines()[0]
    assert len(json.loads(first_line)[1]) == 3


def test_generation_does_not_change_the_model_or_the_random_state(monkeypatch):
    fingerprint_before = fingerprint(MODEL)
    random_state = torch.get_rng_state()
    MODEL.train()

    first_documents(GENERATOR, 2)
    assert MODEL.training
    assert fingerprint(MODEL) == fingerprint_before
    assert torch.equal(torch.get_rng_state(), random_state)

    monkeypatch.setattr(MODEL, "generate", Mock(side_effect=RuntimeError("out of memory")))
    with pytest.raises(RuntimeError, match="out of memory"):
        first_documents(GENERATOR, 3, seed=1)
    assert MODEL.training
    MODEL.eval()


def test_invalid_kinds_models_and_cache_folders_are_refused(cache):
    with pytest.raises(StructPruneError, match="The domain 'a': a model generates self:any only, got self:math"):
        load_domains(config(domains=[DomainConfig("a", "self:math")]), TOKENIZER, MODEL)
    with pytest.raises(StructPruneError, match="self:any requires a causal language model, and BertForMaskedLM is"):
        first_documents((build("bert"), TOKENIZER), 1)

    cache.write_text("")
    with pytest.raises(StructPruneError, match="cannot be kept in .*Set HF_HOME"):
        first_documents(GENERATOR, 1)


def test_generated_text_is_refused_without_a_model():
    with pytest.raises(StructPruneError, match="'own' is text that the model generates, and this command"):
        load_domains(config_with_generated_text(), TOKENIZER)


def test_a_model_is_pruned_on_its_generated_text(caplog):
    caplog.set_level("INFO", logger="optimum_structprune.system.stages")
    pruner = StructPruner(StructPruneConfig.from_dict(config_with_generated_text().to_dict()))

    pruned = pruner.prune_model(MODEL, TOKENIZER)

    assert pruned.config.intermediate_size == 1024
    entry = pruner.result.manifest.domains[0]
    assert entry.origin["source"] == "self:any"
    assert entry.calibration_tokens == 2 * 32

    # Generation is announced and timed separately from reading.
    seconds = pruner.result.report.seconds
    assert seconds["writing"] > 0
    assert seconds["domains"] > 0
    measuring = "Measuring the model …"
    stages = ["Reading text …", "Generating text …", measuring, "Reading unseen text …", "Pruning …", measuring]
    assert [line for line in caplog.messages if "…" in line] == stages

    caplog.clear()
    pruner.prune_model(MODEL, TOKENIZER)
    assert "writing" not in pruner.result.report.seconds
    assert "Generating text …" not in caplog.messages


def test_only_required_text_is_generated(cache):
    domain, _ = load_domains(config_with_generated_text(), TOKENIZER, model=MODEL)

    required = set(domain.documents).union(domain.heldout_documents)
    (path,) = cache.iterdir()
    batches = [json.loads(line) for line in path.read_text().splitlines() if line]
    num_generated = sum(len(documents) for _, documents, _ in batches)
    assert len(required) <= num_generated <= len(required) + generated.FIRST_BATCH


# --- general text in addition to the domains of a user
TEXTS = [f"Tom gave {i} red apples to Ann, and {i + 1} green ones to her sister." for i in range(200)]
OWN_DOMAIN = DomainConfig("own", TEXTS)
OWN_TEXT_CONFIG = StructPruneConfig(widths={"mlp": 24}, num_samples=10, seq_length=24, domains=[OWN_DOMAIN])
DOMAIN_PAIR = [DomainConfig("a", "a.txt", 2), DomainConfig("b", "b.txt")]


def pruning_config(domains, **fields):
    """Return a config that removes a fifth of the parameters."""
    return StructPruneConfig(sparsity=0.2, domains=domains, **fields)


def calibration_tokens(pruner):
    """Return the number of calibration tokens of each domain."""
    return {entry.name: entry.calibration_tokens for entry in pruner.result.manifest.with_use(CALIBRATED)}


def test_a_config_without_domains_has_built_in_general_text():
    settings = replace(pruning_config(DOMAIN_PAIR), domains=None)

    general = texts_of(settings)[-1]

    assert general.source == "builtin:general-prose-code-math"
    assert general.weight == 3.0
    assert with_written_text(settings) is settings


def test_general_text_is_added_to_the_domains():
    settings = pruning_config(DOMAIN_PAIR)
    assert texts_of(settings) == settings.domains
    assert texts_of(replace(settings, general_share=0)) == settings.domains

    texts = texts_of(replace(settings, general_share=0.25))
    general = texts.pop()
    assert texts == settings.domains
    assert general.source == "builtin:general"
    assert general.weight == 1.0


def test_a_fifth_of_the_text_is_generated_by_default():
    settings = pruning_config(DOMAIN_PAIR)
    with_generated_text = replace(settings, general_text="self:any")
    trimming = replace(settings, sparsity=None, widths={"vocab": 300})

    assert texts_of(with_generated_text) == settings.domains + [DomainConfig("general", "self:any", 0.75)]
    assert with_written_text(settings) == with_generated_text

    general = DomainConfig("general", "builtin:general-languages", 0.75)
    assert texts_of(with_written_text(trimming)) == settings.domains + [general]


def test_no_general_text_is_added_to_a_general_domain():
    for name, source in [
        ("general", "a.txt"),
        ("a", "self:any"),
        ("a", "builtin:general-code"),
        ("a", "preset:general"),
    ]:
        domains = [DomainConfig(name, source)]
        settings = pruning_config(domains)
        assert with_written_text(settings) is settings
        with pytest.raises(StructPruneError, match="general_share=0.1 adds a domain 'general'"):
            pruning_config(domains, general_share=0.1)


def test_explicit_general_text_is_not_replaced():
    domains = [DomainConfig("a", "a.txt"), DomainConfig("b", "b.txt")]

    for fields in ({"num_samples": 2}, {"general_share": 0}, {"general_text": "builtin:general"}):
        settings = pruning_config(domains, **fields)
        assert with_written_text(settings) is settings

    with pytest.raises(StructPruneError, match="general_share=0. Pass general_share=0.2"):
        pruning_config(domains, general_share=0, general_text="self:any")


def test_a_fifth_of_the_calibration_tokens_is_generated(tmp_path):
    pruner = StructPruner(OWN_TEXT_CONFIG)
    pruned = pruner.prune_model(MODEL, TOKENIZER)

    assert calibration_tokens(pruner) == {"general": 2 * 24, "own": 8 * 24}
    entries = {entry.name: entry for entry in pruner.result.manifest.with_use(CALIBRATED)}
    assert entries["general"].origin["source"] == "self:any"
    assert pruner.config is OWN_TEXT_CONFIG
    assert pruner.result.config == replace(OWN_TEXT_CONFIG, general_text="self:any")

    pruner.save(pruned, tmp_path / "out", TOKENIZER)
    saved_config = StructPruneConfig.from_pretrained(tmp_path / "out")
    assert saved_config.general_text == "self:any"
    assert texts_of(saved_config)[-1].source == "self:any"


def test_the_share_of_general_text_is_configurable():
    pruner = StructPruner(replace(OWN_TEXT_CONFIG, general_share=0.5))

    pruner.prune_model(MODEL, TOKENIZER)

    assert calibration_tokens(pruner) == {"own": 120, "general": 120}


def test_only_a_causal_model_in_memory_with_a_tokenizer_generates_text(monkeypatch):
    assert can_write(MODEL, TOKENIZER)
    assert not can_write(MODEL, None)
    assert not can_write(build("bert"), TOKENIZER)
    assert not can_write(build("t5"), TOKENIZER)

    monkeypatch.setattr(load, "is_offloaded", lambda model: True)
    assert not can_write(MODEL, TOKENIZER)


@pytest.mark.slow
def test_a_model_without_useful_generated_text_is_pruned_on_the_domains(caplog, monkeypatch):
    monkeypatch.setattr(generated, "MIN_TOKENS", 1_000)
    pruner = StructPruner(replace(OWN_TEXT_CONFIG, domains=[DomainConfig("own", iter(TEXTS))]))

    with caplog.at_level(logging.WARNING):
        pruner.prune_model(MODEL, TOKENIZER)

    names = [entry.name for entry in pruner.result.manifest.with_use(CALIBRATED)]
    assert names == ["own"], "the failed generation has not used up the iterator"
    assert "only the configured domains are used: self:any" in caplog.text


def test_no_text_is_read_in_addition_to_inputs():
    settings = StructPruneConfig(widths={"mlp": 24}, domains=config().domains, num_samples=8, seq_length=24)
    pruner = StructPruner(settings)

    pruner.prune_model(build("llama-tied"), tokenizer(), inputs={"ids": torch.arange(240).view(10, 24) % 60})

    assert [entry.name for entry in pruner.result.manifest.domains] == ["ids"]
