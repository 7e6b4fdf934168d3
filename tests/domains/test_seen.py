"""What was seen stays seen: no document that is held out has another use, and no choice sees what is reported."""

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
from optimum_structprune.domains.packing import MAX_SKIPPED_DOCUMENTS, Domain
from optimum_structprune.recovery.text import TextStream, text_config
from optimum_structprune.search.sensitivity import choose_shape
from optimum_structprune.steps.base import RunState


TEXTS = documents(80)
READER, MODEL = tokenizer(), build("llama-tied")
# Rows of one pool of texts, repeated and in any order, so that domains overlap in all ways.
rows = st.lists(st.integers(0, len(TEXTS) - 1), min_size=20, max_size=150)
choices = st.sampled_from([{}, {"allocation": "sensitivity"}])
often = settings(max_examples=25)


def domain(name: str, numbers: list[int], weight: float = 1.0) -> DomainConfig:
    return DomainConfig(name, [TEXTS[number] for number in numbers], weight=weight)


def uses(domains: list[Domain]) -> tuple[set[str], set[str], set[str]]:
    names = ("heldout_documents", "documents", "probe_documents")
    held, used, probe = (set().union(*(getattr(domain, name) for domain in domains)) for name in names)
    return held, used, probe


def assert_apart(domains: list[Domain]) -> None:
    held, used, probe = uses(domains)
    assert held and used and not held & used and not held & probe and not used & probe


@often
@given(texts=st.lists(rows, min_size=1, max_size=3), weight=st.floats(0.2, 5), more=choices)
def test_what_is_held_out_has_no_other_use_in_any_domain(texts, weight, more):
    named = [domain(f"d{number}", numbers, weight if number else 1.0) for number, numbers in enumerate(texts)]
    asked = config(domains=named, num_samples=6, **more)
    try:
        assert_apart(load_domains(asked, READER))
    except StructPruneError as error:
        assert "serves only one of the two" in str(error) or "ended after 4 passes" in str(error)


@often
@given(first=rows, second=rows, seed=st.integers(0, 3), seq_length=st.sampled_from([16, 24, 40]), more=choices)
def test_a_training_and_a_later_pruning_keep_to_what_was_held_out(first, second, seed, seq_length, more):
    asked = config(domains=[domain("a", first)], num_samples=4, seed=seed, **more)
    try:
        before = load_domains(asked, READER)
        seen = Manifest.of(asked, before, READER)
        trains = recovery_config(domains=[domain("b", second)], tokens=4 * seq_length, seq_length=seq_length)
        stream = TextStream(text_config(trains, asked, seq_length), READER, MODEL, seen)
        assert len(list(stream.samples(4))) == 4
        trained = stream.entries()
        assert all(entry.use == TRAINED for entry in trained)
        seen = seen.with_entries(trained)
        later = load_domains(replace(asked, domains=[domain("c", second)]), READER, earlier=seen)
    except StructPruneError as error:
        assert "serves only one of the two" in str(error) or "ended after 4 passes" in str(error)
        return
    assert_apart(before)
    held, used, probe = uses([*before, *trained])
    # What widths were chosen by may be trained on, as calibration text may; perplexity is of neither.
    assert not held & (used | probe)
    assert not held & uses(later)[1] and not used & uses(later)[0]


def test_a_text_that_repeats_itself_forever_ends():
    with patch("optimum_structprune.domains.packing.MAX_SKIPPED_DOCUMENTS", MAX_SKIPPED_DOCUMENTS // 100):
        with pytest.raises(StructPruneError, match=r"documents \(1 without duplicates\).*serves only one of the two"):
            load_domains(config(domains=[DomainConfig("a", repeat(TEXTS[0]))], num_samples=2), READER)


def test_a_pruning_of_a_result_remembers_what_that_one_has_seen(tmp_path):
    first = StructPruner(config(domains=[domain("a", list(range(40)))]))
    first.save(first.prune_model(build("llama-tied"), READER), tmp_path / "once", READER)
    once = type(build("llama-tied")).from_pretrained(tmp_path / "once")
    again = StructPruner(config(widths={"mlp": 16}, domains=[domain("b", list(range(20, 80)))]))
    again.save(again.prune_model(once, READER), tmp_path / "twice", READER)
    data = json.loads((tmp_path / "twice" / "calibration_manifest.json").read_text())
    uses = [(entry["name"], entry["use"]) for entry in data["domains"]]
    assert uses == [("b", CALIBRATED), ("other", JUDGED), ("a", EARLIER), ("other", EARLIER)]
    assert not set(data["domains"][0]["heldout_documents"]) & set(data["domains"][2]["documents"])


def other(samples):
    """Samples of the same shape with other tokens."""
    return torch.randint(3, 96, samples.shape, generator=torch.Generator().manual_seed(7))


def test_no_choice_sees_the_text_that_is_reported_and_no_report_measures_what_was_chosen_on():
    settings = config(allocation="sensitivity", sparsity=0.3, round_to=4)
    domains = load_domains(settings, tokenizer())
    unseen = [replace(domain, heldout=other(domain.heldout)) for domain in domains]
    chosen_on = [replace(domain, probe=other(domain.probe)) for domain in domains]
    every = [data_of(settings, read) for read in (domains, unseen, chosen_on)]
    shapes = [choose_shape(RunState.start(MODEL, describe(MODEL), data), settings) for data in every]
    run, same_choice, same_report = (pruned_on(data, MODEL, shape) for data, shape in zip(every, shapes, strict=True))
    assert run.plan == same_choice.plan and same_weights(run.model, same_choice.model)
    losses, same = run.report.domains, same_report.report.domains
    assert losses != same_choice.report.domains
    assert all(domain.perplexity.dense == same[name].perplexity.dense for name, domain in losses.items())
    manifest = Manifest.of(settings, domains, tokenizer())
    decided = manifest.domains[0].probe_documents
    (said,) = manifest.overlaps("elsewhere", decided)
    assert manifest.domains[0].probe_sha256 and said.startswith(f"{len(decided)} of {len(decided)} documents decided")
    assert all(domain.probe is None for domain in load_domains(config(), tokenizer())), "where nothing is chosen"
    (probed,) = given_domains({"a": torch.arange(40).reshape(20, 2)}, 0.1, probe=True)
    assert torch.cat([probed.heldout, probed.probe, probed.samples]).equal(torch.arange(40).reshape(20, 2))


def test_more_is_held_out_as_far_as_there_is_text_until_a_ratio_is_no_longer_rough():
    for texts, least, most in ((40, 5, 38), (400, 39, 39)):
        (loaded,) = load_domains(config(domains=[DomainConfig("a", documents(texts))], num_samples=40), READER)
        assert_apart([loaded])
        assert len(loaded.samples) == 40 and least <= len(loaded.heldout) <= most
        assert len(set(loaded.heldout_documents)) == len(loaded.heldout_documents)
