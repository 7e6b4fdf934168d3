"""Text that the model writes itself."""

import itertools
import json
import logging
import shutil
from dataclasses import replace
from unittest.mock import MagicMock, Mock

import pytest
import torch
import yaml
from models import CHATML, build, config, real_text_model, tokenizer
from trained import needs_shared, stories_model
from transformers import GenerationConfig

from optimum_structprune import DomainConfig, StructPruneConfig, StructPruneError, StructPruner
from optimum_structprune.config.fields import read_yaml
from optimum_structprune.domains import generated, load
from optimum_structprune.domains.generated import self_documents
from optimum_structprune.domains.load import can_write, load_domains, texts_of, with_written_text
from optimum_structprune.domains.manifest import CALIBRATED
from optimum_structprune.system.fingerprint import fingerprint


MODEL, READER = WRITER = real_text_model()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The folder of what models write, which is short here."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path))
    for name, number in {"MIN_BATCH": 4, "MAX_BATCH": 8, "MAX_TOKENS": 24, "MIN_TOKENS": 8}.items():
        monkeypatch.setattr(generated, name, number)
    return tmp_path / "structprune"


def first(writer, count: int, name: str = "math", seed: int = 0):
    tokens = round(count * generated.EXPECTED_SHARE * generated.MAX_TOKENS)
    return list(itertools.islice(self_documents(*writer, name, seed, tokens), count))


def test_every_kind_goes_on_from_an_opening():
    for name in ("code", "math", "prose", "dialogue", "reasoning"):
        texts = first(WRITER, 6, name)
        assert len(set(texts)) == 6
        kind = read_yaml(generated.SEED_PROMPTS)[name]
        openings = tuple(form.replace("{topic}", topic) for form in kind["begin"] for topic in kind["topics"])
        assert all(text.startswith(openings) and text not in openings for text in texts)


def test_text_of_any_kind_begins_with_a_word_of_the_vocabulary():
    words = generated.vocabulary_words(READER)
    texts = first(WRITER, len(words), "any")
    assert len({max(filter(text.startswith, words), key=len) for text in texts}) > len(words) / 2
    assert first(WRITER, 8, "any", seed=1) != texts
    # A vocabulary without capitals gives what it has.
    reader = MagicMock(all_special_ids=(0,), decode=lambda ids: ["<s>", "a", " ", "ing", "1"][ids[0]])
    reader.__len__.return_value = 5
    assert generated.vocabulary_words(reader) == ["1", "a", "ing"]


def test_what_was_written_is_read_from_the_disk_and_continued(cache, monkeypatch):
    whole = first(WRITER, 30)
    shutil.rmtree(cache)
    short = first(WRITER, 13)
    sizes, model = [], type(MODEL)
    generate = model.generate
    monkeypatch.setattr(model, "generate", lambda *args, **how: sizes.append(len(args[1])) or generate(*args, **how))
    # Whatever has been kept, the same is written for as many; all but the last batch is the same for more.
    assert first(WRITER, 13) == short and sizes == []
    longer = first(WRITER, 30)
    assert longer == whole and longer[:5] == short[:5] and sizes[0] == 8 and sum(sizes) < 30


def test_tokens_are_drawn_by_their_probability_among_the_likely():
    shares = torch.tensor([0.5, 0.3, 0.19, 0.009, 0.001]).repeat(4000, 1)
    shares[1::2] = shares[1::2].flip(1)
    torch.manual_seed(0)
    tokens = generated.sample_min_p(shares.log() + 7)
    assert tokens.shape == (4000, 1)
    for rows, expected in ((tokens[::2], shares[0]), (tokens[1::2], shares[1])):
        counts = rows.flatten().bincount(minlength=5) / len(rows)
        likely = expected >= generated.MIN_P * expected.max()
        assert (counts[~likely] == 0).all()
        torch.testing.assert_close(counts[likely], expected[likely] / expected[likely].sum(), atol=0.03, rtol=0)


def test_a_damaged_file_and_a_line_that_was_cut_off_are_written_anew(cache):
    texts = first(WRITER, 6)
    (file,) = cache.iterdir()
    kept = file.read_bytes()
    for damaged in (b"\x00\xff damaged\n" + kept[:-9], kept[: len(kept) // 2]):
        file.write_bytes(damaged)
        assert first(WRITER, 6) == texts == first(WRITER, 6)


def test_a_prompt_that_comes_again_is_answered_otherwise(monkeypatch, tmp_path):
    (tmp_path / "one.yaml").write_text(yaml.safe_dump({"math": {"ask": [], "begin": ["Problem: "], "topics": [""]}}))
    monkeypatch.setattr(generated, "SEED_PROMPTS", tmp_path / "one.yaml")
    texts = first(WRITER, 12)
    assert len(set(texts)) == 12 and all(text.startswith("Problem: ") for text in texts)


def test_another_model_or_setting_has_a_file_of_its_own(cache, monkeypatch):
    first(WRITER, 1)
    other, _ = real_text_model()
    with torch.no_grad():
        other.get_input_embeddings().weight[3, 3] += 0.01
    first((other, READER), 1)
    monkeypatch.setattr(generated, "MIN_P", 0.1)
    first(WRITER, 1)
    monkeypatch.setattr(MODEL, "generation_config", GenerationConfig(eos_token_id=[7]))  # what ends a text
    first(WRITER, 1)
    assert len(list(cache.iterdir())) == 4


def test_a_chat_model_is_asked():
    model, reader = real_text_model()
    reader.chat_template = CHATML
    for name, keeps in (("math", False), ("dialogue", True)):
        for text in first((model, reader), 4, name):
            assert text.startswith("<s>user\n") == ("<s>assistant\n" in text) == keeps


def writing(model, rows: list[list[int]], monkeypatch) -> None:
    """Make a model write these tokens after its prompts, over and over where there are more of those."""
    number = itertools.count()

    def sample(scores, min_p):
        at = next(number) % generated.MAX_TOKENS
        column = [(row + [model.config.eos_token_id] * generated.MAX_TOKENS)[at] for row in rows]
        return torch.tensor((column * len(scores))[: len(scores)]).unsqueeze(1)

    monkeypatch.setattr(generated, "sample_min_p", sample)


@pytest.mark.parametrize("ids", [[5, 6] * 8, [*range(5, 11)]], ids=["repeats itself", "short"])
def test_documents_of_no_use_are_dropped(ids, monkeypatch):
    writing(MODEL, [ids], monkeypatch)
    with pytest.raises(StructPruneError, match="self:math: the last 120 documents of the model are too short"):
        first(WRITER, 1)


@needs_shared
def test_text_that_the_model_finds_unlikely_is_dropped(cache, monkeypatch):
    model, reader = stories_model()
    story = "Once upon a time there was a little girl named Lily. She loved to play outside in the big park"
    likely = [reader(f"{story} with her {pet}.")["input_ids"] for pet in ("dog", "cat", "friends")]
    noise = torch.randperm(400, generator=torch.Generator().manual_seed(0))[:30].add(50).tolist()
    writing(model, [*likely, noise], monkeypatch)
    assert all("Lily" in text for text in first((model, reader), 3))
    (path,) = cache.iterdir()
    assert len(json.loads(path.read_text().strip().splitlines()[0])[1]) == 3


def test_the_model_and_the_callers_random_numbers_are_left_as_they_were_and_the_model_when_writing_fails(monkeypatch):
    before, random = fingerprint(MODEL), torch.get_rng_state()
    MODEL.train()
    first(WRITER, 2)
    assert MODEL.training and fingerprint(MODEL) == before and torch.equal(torch.get_rng_state(), random)
    monkeypatch.setattr(MODEL, "generate", Mock(side_effect=RuntimeError("out of memory")))
    with pytest.raises(RuntimeError, match="out of memory"):
        first(WRITER, 3, seed=1)
    assert MODEL.training
    MODEL.eval()


def test_models_kinds_and_folders_that_will_not_do(cache):
    for case, name, message in (
        ("llama-tied", "maths", "cannot generate 'maths'. Did you mean 'math'"),
        ("bert", "math", "self:math requires a causal language model, and BertForMaskedLM is not one"),
    ):
        with pytest.raises(StructPruneError, match=message):
            first((build(case), READER), 1, name)
    cache.write_text("")
    with pytest.raises(StructPruneError, match="cannot be kept in .*Set HF_HOME"):
        first(WRITER, 1)
    with pytest.raises(StructPruneError, match="'own' is text that the model generates, and this command"):
        load_domains(own(), READER)


def own() -> StructPruneConfig:
    domains = [DomainConfig("own", "self:math"), DomainConfig("other", "builtin:math")]
    return StructPruneConfig(widths={"mlp": 1024}, domains=domains, num_samples=4, seq_length=32)


def test_pruned_on_what_it_wrote_itself(caplog):
    caplog.set_level("INFO", logger="optimum_structprune.system.stages")
    pruner = StructPruner(StructPruneConfig.from_dict(own().to_dict()))
    assert pruner.prune_model(*WRITER).config.intermediate_size == 1024
    entry, seconds = pruner.manifest.domains[0], pruner.report.seconds
    assert (entry.origin["source"], entry.calibration_tokens) == ("self:math", 2 * 32)
    assert min(seconds["writing"], seconds["domains"]) > 0, "writing is announced and timed apart from reading"
    stages = ["Reading text …", "Generating text …", "Measuring the model …", "Reading unseen text …", "Round 1 …"]
    assert [line for line in caplog.messages if "…" in line] == stages
    caplog.clear()
    pruner.prune_model(*WRITER)
    assert "writing" not in pruner.report.seconds and "Generating text …" not in caplog.messages


def test_no_more_is_written_than_is_needed(cache):
    (domain, _) = load_domains(own(), READER, model=MODEL)
    (path,) = cache.iterdir()
    needed = {*domain.documents, *domain.heldout_documents}
    batches = [json.loads(line) for line in path.read_text().splitlines() if line]
    kept = sum(len(documents) for _, documents in batches)
    assert len(needed) <= kept <= len(needed) + generated.MIN_BATCH


# --- text of every kind beside the domains of a user
TEXTS = [f"Tom gave {i} red apples to Ann, and {i + 1} green ones to her sister." for i in range(200)]
BESIDE = StructPruneConfig(widths={"mlp": 24}, num_samples=10, seq_length=24, domains=[DomainConfig("own", TEXTS)])


def pruning_of(*domains, **fields) -> StructPruneConfig:
    return StructPruneConfig(sparsity=0.2, domains=[DomainConfig(*domain) for domain in domains], **fields)


def test_general_text_adds_a_domain_and_leaves_the_others_as_they_are():
    pair = [("a", "a.txt", 2), ("b", "b.txt")]
    alone = pruning_of(*pair)
    unnamed = replace(alone, domains=None)
    half = texts_of(unnamed)[-1]
    assert with_written_text(unnamed) is unnamed
    assert (half.source, half.weight) == ("builtin:general-prose-code-math", 3.0)
    *kept, general = texts_of(replace(alone, general_share=0.25))
    assert kept == alone.domains == texts_of(replace(alone, general_share=0)) == texts_of(alone)
    assert (general.source, general.weight) == ("builtin:general", 1.0)
    written = replace(alone, general_text="self:any")
    assert texts_of(written) == [*kept, DomainConfig("general", "self:any", 0.75)]
    assert with_written_text(alone) == written
    trimmed = with_written_text(replace(alone, sparsity=None, widths={"vocab": 300}))
    assert texts_of(trimmed) == [*kept, DomainConfig("general", "builtin:general-languages", 0.75)]


def test_general_text_is_left_out_where_it_has_no_place_or_something_is_said_of_it():
    for domain in [("general", "a.txt"), ("a", "self:any"), ("a", "builtin:general-code"), ("a", "preset:general")]:
        alone = pruning_of(domain)
        assert with_written_text(alone) is alone
        with pytest.raises(StructPruneError, match="general_share=0.1 adds a domain 'general'"):
            pruning_of(domain, general_share=0.1)
    pair = [("a", "a.txt"), ("b", "b.txt")]
    for fields in ({"num_samples": 2}, {"general_share": 0}, {"general_text": "builtin:general"}):
        said = pruning_of(*pair, **fields)
        assert with_written_text(said) is said
    with pytest.raises(StructPruneError, match="general_share=0. Pass general_share=0.2"):
        pruning_of(*pair, general_share=0, general_text="self:any")


def test_a_model_writes_a_fifth_beside_the_domains(tmp_path):
    pruner = StructPruner(BESIDE)
    pruned = pruner.prune_model(*WRITER)
    entries = {entry.name: entry for entry in pruner.manifest.of_use(CALIBRATED)}
    sizes = {name: entry.calibration_tokens for name, entry in entries.items()}
    assert sizes == {"general": 2 * 24, "own": 8 * 24} and entries["general"].origin["source"] == "self:any"
    assert pruner.config is BESIDE and pruner.result.config == replace(BESIDE, general_text="self:any")
    pruner.save(pruned, tmp_path / "out", READER)
    saved = StructPruneConfig.from_pretrained(tmp_path / "out")
    other = StructPruner(replace(BESIDE, general_share=0.5))
    other.prune_model(*WRITER)
    tokens = {entry.name: entry.calibration_tokens for entry in other.manifest.of_use(CALIBRATED)}
    assert tokens == {"own": 120, "general": 120}
    assert (saved.general_text, texts_of(saved)[-1].source) == ("self:any", "self:any")


def test_who_cannot_write_reads_no_more(monkeypatch):
    assert can_write(MODEL, READER) and not can_write(MODEL, None)
    assert not can_write(build("bert"), READER) and not can_write(build("t5"), READER)
    monkeypatch.setattr(load, "is_offloaded", lambda model: True)
    assert not can_write(MODEL, READER)


@pytest.mark.slow
def test_a_model_that_writes_nothing_of_use_is_pruned_on_the_domains_alone(caplog, monkeypatch):
    monkeypatch.setattr(generated, "MIN_TOKENS", 1_000)
    pruner = StructPruner(replace(BESIDE, domains=[DomainConfig("own", iter(TEXTS))]))
    with caplog.at_level(logging.WARNING):
        pruner.prune_model(*WRITER)
    names = [entry.name for entry in pruner.manifest.of_use(CALIBRATED)]
    assert names == ["own"], "a generator is not used up by then"
    assert "only the configured domains are used: self:any" in caplog.text


def test_inputs_are_all_that_is_read():
    settings = StructPruneConfig(widths={"mlp": 24}, domains=config().domains, num_samples=8, seq_length=24)
    pruner = StructPruner(settings)
    pruner.prune_model(build("llama-tied"), tokenizer(), inputs={"ids": torch.arange(240).view(10, 24) % 60})
    assert [entry.name for entry in pruner.manifest.domains] == ["ids"]
