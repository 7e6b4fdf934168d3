"""Each document has one use: held-out text is never calibrated on, and no choice depends on reported text."""

import json
from dataclasses import replace
from itertools import repeat
from unittest.mock import patch

import pytest
import torch
from helpers import data_of, pruned_on, recovery_config, same_weights
from hypothesis import given, settings
from hypothesis import strategies as st
from models import build, config, documents, tokenizer

from optimum_structprune import DomainConfig, Manifest, StructPruneError, StructPruner
from optimum_structprune.arch.load import describe
from optimum_structprune.domains.load import given_domains, load_domains
from optimum_structprune.domains.manifest import CALIBRATED, EARLIER, JUDGED, TRAINED
from optimum_structprune.domains.packing import MAX_SKIPPED_DOCUMENTS
from optimum_structprune.recovery.text import TextStream, text_config
from optimum_structprune.search.sensitivity import choose_shape
from optimum_structprune.steps.base import RunState


TEXTS = documents(80)
TOKENIZER = tokenizer()
MODEL = build("llama-tied")
# Rows of one pool of texts, repeated and in any order, so that domains overlap in all ways.
row_numbers = st.lists(st.integers(0, len(TEXTS) - 1), min_size=20, max_size=150)
extra_fields = st.sampled_from([{}, {"allocation": "sensitivity"}])
few_examples = settings(max_examples=25)


def build_domain(name, numbers, weight=1.0):
    """Return a domain of the texts with these numbers."""
    return DomainConfig(name, [TEXTS[number] for number in numbers], weight=weight)


def all_documents(domains, use):
    """Return the hashes of the documents that have a use in any domain."""
    hashes = set()
    for domain in domains:
        hashes.update(getattr(domain, use))
    return hashes


def assert_uses_are_disjoint(domains):
    heldout = all_documents(domains, "heldout_documents")
    calibration = all_documents(domains, "documents")
    probe = all_documents(domains, "probe_documents")

    assert heldout
    assert calibration
    assert heldout.isdisjoint(calibration)
    assert heldout.isdisjoint(probe)
    assert calibration.isdisjoint(probe)


def assert_too_little_text(error):
    """Assert that an error is about text that ended or that has another use."""
    assert "serves only one of the two" in str(error) or "ended after 4 passes" in str(error)


@few_examples
@given(
    numbers_by_domain=st.lists(row_numbers, min_size=1, max_size=3),
    weight=st.floats(0.2, 5),
    fields=extra_fields,
)
def test_held_out_documents_have_no_other_use_in_any_domain(numbers_by_domain, weight, fields):
    domains = [build_domain("d0", numbers_by_domain[0])]
    for index, numbers in enumerate(numbers_by_domain[1:], start=1):
        domains.append(build_domain(f"d{index}", numbers, weight))
    pruning_config = config(domains=domains, num_samples=6, **fields)

    try:
        loaded = load_domains(pruning_config, TOKENIZER)
    except StructPruneError as error:
        assert_too_little_text(error)
    else:
        assert_uses_are_disjoint(loaded)


@few_examples
@given(
    first_numbers=row_numbers,
    second_numbers=row_numbers,
    seed=st.integers(0, 3),
    seq_length=st.sampled_from([16, 24, 40]),
    fields=extra_fields,
)
def test_held_out_documents_stay_unused_in_a_training_and_a_later_pruning(
    first_numbers, second_numbers, seed, seq_length, fields
):
    pruning_config = config(domains=[build_domain("a", first_numbers)], num_samples=4, seed=seed, **fields)
    trained_domain = build_domain("b", second_numbers)
    later_domain = build_domain("c", second_numbers)

    try:
        calibrated = load_domains(pruning_config, TOKENIZER)
        manifest = Manifest.of(pruning_config, calibrated, TOKENIZER)
        training = recovery_config(domains=[trained_domain], tokens=4 * seq_length, seq_length=seq_length)
        stream = TextStream(text_config(training, pruning_config, seq_length), TOKENIZER, MODEL, manifest)
        assert len(list(stream.samples(4))) == 4
        trained = stream.entries()
        assert all(entry.use == TRAINED for entry in trained)
        manifest = manifest.with_entries(trained)
        later = load_domains(replace(pruning_config, domains=[later_domain]), TOKENIZER, earlier=manifest)
    except StructPruneError as error:
        assert_too_little_text(error)
        return

    assert_uses_are_disjoint(calibrated)
    earlier = calibrated + trained
    heldout = all_documents(earlier, "heldout_documents")
    # A training may use documents that decided on widths.
    assert heldout.isdisjoint(all_documents(earlier, "documents"))
    assert heldout.isdisjoint(all_documents(earlier, "probe_documents"))

    assert heldout.isdisjoint(all_documents(later, "documents"))
    assert all_documents(earlier, "documents").isdisjoint(all_documents(later, "heldout_documents"))


def test_endless_repeated_text_is_refused():
    domain = DomainConfig("a", repeat(TEXTS[0]))

    with patch("optimum_structprune.domains.packing.MAX_SKIPPED_DOCUMENTS", MAX_SKIPPED_DOCUMENTS // 100):
        with pytest.raises(StructPruneError, match=r"documents \(1 without duplicates\).*serves only one of the two"):
            load_domains(config(domains=[domain], num_samples=2), TOKENIZER)


def test_a_second_pruning_remembers_the_text_of_the_first(tmp_path):
    first_pruner = StructPruner(config(domains=[build_domain("a", list(range(40)))]))
    first_pruned = first_pruner.prune_model(build("llama-tied"), TOKENIZER)
    first_pruner.save(first_pruned, tmp_path / "once", TOKENIZER)
    reloaded = type(MODEL).from_pretrained(tmp_path / "once")

    second_pruner = StructPruner(config(widths={"mlp": 16}, domains=[build_domain("b", list(range(20, 80)))]))
    second_pruned = second_pruner.prune_model(reloaded, TOKENIZER)
    second_pruner.save(second_pruned, tmp_path / "twice", TOKENIZER)

    manifest = json.loads((tmp_path / "twice" / "calibration_manifest.json").read_text())
    entries = manifest["domains"]
    uses = [(entry["name"], entry["use"]) for entry in entries]
    assert uses == [("b", CALIBRATED), ("other", JUDGED), ("a", EARLIER), ("other", EARLIER)]
    assert set(entries[0]["heldout_documents"]).isdisjoint(entries[2]["documents"])


def other_tokens(samples):
    """Return samples of the same shape with other tokens."""
    return torch.randint(3, 96, samples.shape, generator=torch.Generator().manual_seed(7))


def prune_with_chosen_shape(pruning_config, domains):
    """Choose widths and prune the model on loaded domains, and return the finished run."""
    data = data_of(pruning_config, domains)
    shape = choose_shape(RunState.start(MODEL, describe(MODEL), data), pruning_config)
    return pruned_on(data, MODEL, shape)


def test_choices_ignore_reported_text_and_reports_ignore_text_of_choices():
    pruning_config = config(allocation="sensitivity", sparsity=0.3, round_to=4)
    domains = load_domains(pruning_config, tokenizer())
    other_heldout = [replace(domain, heldout=other_tokens(domain.heldout)) for domain in domains]
    other_probe = [replace(domain, probe=other_tokens(domain.probe)) for domain in domains]

    state = prune_with_chosen_shape(pruning_config, domains)
    state_of_other_heldout = prune_with_chosen_shape(pruning_config, other_heldout)
    state_of_other_probe = prune_with_chosen_shape(pruning_config, other_probe)

    assert state.plan == state_of_other_heldout.plan
    assert same_weights(state.model, state_of_other_heldout.model)
    assert state.report.domains != state_of_other_heldout.report.domains
    for name, domain in state.report.domains.items():
        assert domain.perplexity.original == state_of_other_probe.report.domains[name].perplexity.original


def test_the_manifest_names_the_documents_of_a_choice():
    pruning_config = config(allocation="sensitivity", sparsity=0.3, round_to=4)
    manifest = Manifest.of(pruning_config, load_domains(pruning_config, tokenizer()), tokenizer())

    entry = manifest.domains[0]
    (sentence,) = manifest.overlaps("elsewhere", entry.probe_documents)

    count = len(entry.probe_documents)
    assert entry.probe_sha256
    assert sentence.startswith(f"{count} of {count} documents decided")


def test_text_is_set_aside_for_choices_only_if_a_choice_is_made():
    assert all(domain.probe is None for domain in load_domains(config(), tokenizer()))

    inputs = torch.arange(40).reshape(20, 2)
    (domain,) = given_domains({"a": inputs}, 0.1, probe=True)
    assert torch.cat([domain.heldout, domain.probe, domain.samples]).equal(inputs)


def test_long_text_has_more_held_out_samples():
    for num_texts, min_heldout, max_heldout in ((40, 5, 38), (400, 39, 39)):
        domain = DomainConfig("a", documents(num_texts))

        (loaded,) = load_domains(config(domains=[domain], num_samples=40), TOKENIZER)

        assert_uses_are_disjoint([loaded])
        assert len(loaded.samples) == 40
        assert min_heldout <= len(loaded.heldout) <= max_heldout
        assert len(set(loaded.heldout_documents)) == len(loaded.heldout_documents)
