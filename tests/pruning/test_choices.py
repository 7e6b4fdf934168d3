"""What is chosen by measuring is chosen on other text than that which the report measures."""

from dataclasses import replace

import pytest
import torch
from helpers import evidence_of, pruned_on, same_weights
from models import build, config, tokenizer

from optimum_structprune import DomainConfig, Manifest, StructPruner
from optimum_structprune.arch.load import describe
from optimum_structprune.domains.load import given_domains, load_domains
from optimum_structprune.pruning.choose import choose_shape
from optimum_structprune.pruning.run import Run
from optimum_structprune.widths.budget import widths_of


# Everything that lets a measurement decide.
CHOOSING = [
    {"allocation": "sensitivity", "sparsity": 0.3, "round_to": 4},
    {"rounds": 3, "objective": "worst"},
    {"rounds": 3, "max_perplexity_ratio": 1.01, "round_to": 4},
]


def run_on(settings, domains):
    """The finished run of a tiny model, with the widths chosen on the same evidence."""
    model, evidence = build("llama-tied"), evidence_of(settings, domains)
    arch = describe(model)
    widths = choose_shape(Run(model, evidence), widths_of(settings, arch, model)).widths
    return pruned_on(evidence, model, widths)


def other(samples):
    """Samples of the same shape with other tokens."""
    return torch.randint(3, 96, samples.shape, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("fields", CHOOSING)
def test_no_choice_sees_the_text_that_is_reported(fields):
    settings = config(**fields)
    domains = load_domains(settings, tokenizer())
    swapped = [replace(domain, heldout=other(domain.heldout)) for domain in domains]
    before, after = run_on(settings, domains), run_on(settings, swapped)
    assert before.plan == after.plan and same_weights(before.model, after.model)
    assert before.report.rounds == after.report.rounds
    assert before.report.perplexity != after.report.perplexity


def test_no_report_measures_the_text_that_was_chosen_on():
    settings = config(**CHOOSING[-1])
    domains = load_domains(settings, tokenizer())
    swapped = [replace(domain, probe=other(domain.probe)) for domain in domains]
    dense = [
        {name: ppl["before"] for name, ppl in run_on(settings, read).report.perplexity.items()}
        for read in (domains, swapped)
    ]
    assert dense[0] == dense[1]
    assert all(domain.probe is None for domain in load_domains(config(), tokenizer())), "where nothing is chosen"
    (probed,) = given_domains({"a": torch.arange(40).reshape(20, 2)}, 0.1, probe=True)
    assert torch.cat([probed.heldout, probed.probe, probed.samples]).equal(torch.arange(40).reshape(20, 2))
    for domain in domains:
        parts = [set(domain.documents), set(domain.heldout_documents), set(domain.probe_documents)]
        assert all(parts) and len(set.union(*parts)) == sum(map(len, parts))
        assert domain.probe.shape == domain.heldout.shape


def test_the_manifest_tells_text_that_decided_something(tmp_path):
    source = [f"w3 w{number} " * 12 for number in range(4, 60)]
    settings = config(domains=[DomainConfig("a", source)], **CHOOSING[0])
    pruner = StructPruner(settings)
    pruner.prune_model(build("llama-tied"), tokenizer())
    pruner.manifest.save(tmp_path / "manifest.json")
    entry = Manifest.load(tmp_path / "manifest.json").domains[0]
    assert entry.probe_sha256 and not set(entry.probe_documents) & {*entry.documents, *entry.heldout_documents}
    (said,) = pruner.manifest.overlaps("elsewhere", entry.probe_documents)
    assert said.startswith(f"{len(entry.probe_documents)} of {len(entry.probe_documents)} documents decided")
