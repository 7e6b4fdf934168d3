"""What goes on between rounds: weights of the domains, and text set aside."""

import json
from math import inf, isnan

import pytest
import torch
from helpers import data_of, pruned_on
from models import build, config, tokenizer
from trained import STORIES, needs_shared, stories_config, stories_model

from optimum_structprune import DomainConfig, StructPruner
from optimum_structprune.domains.load import load_domains, split_samples
from optimum_structprune.domains.manifest import Entry
from optimum_structprune.pruning import measure
from optimum_structprune.sources.data import CalibrationData


def two_domains(**fields):
    code = DomainConfig(name="code", source="builtin:programs")
    short = {"num_samples": 8, "seq_length": 96, **fields}
    return stories_config(domains=[DomainConfig(name="stories", source=str(STORIES)), code], **short)


def pruned(model, reader, settings):
    pruner = StructPruner(settings)
    return pruner.prune_model(model, reader), pruner


@pytest.mark.long
@needs_shared
def test_shares_move_to_the_domain_that_loses_more_and_their_samples_are_run(monkeypatch):
    used, source = [], CalibrationData.source

    def watched(self, model, arch, feedback):
        made = source(self, model, arch, feedback)
        used.append([sum(len(b.ids) for b in made.batches if b.domain == number) for number in (0, 1)])
        return made

    monkeypatch.setattr(CalibrationData, "source", watched)
    model, reader = stories_model()
    _, pruner = pruned(model, reader, two_domains(rounds=3, objective="worst", num_samples=12))
    rounds = pruner.report.rounds
    assert [one["widths"]["mlp"] for one in rounds] == sorted({one["widths"]["mlp"] for one in rounds}, reverse=True)
    assert rounds[0]["shares"] == {"stories": 0.5, "code": 0.5} and rounds[-1]["widths"] == {"mlp": 96}
    for before, after in zip(rounds, rounds[1:], strict=False):
        ratios = before["perplexity_ratio"]
        assert ratios["stories"] > ratios["code"] and sum(after["shares"].values()) == pytest.approx(1)
        assert before["shares"]["stories"] - 1e-9 <= after["shares"]["stories"] <= 0.75 + 1e-9
    shares = rounds[-1]["shares"]
    assert shares["stories"] > 0.6 and rounds[-1]["perplexity_ratio"] == {}
    line = f"shares in the last round: stories {shares['stories']:.2f}, code {shares['code']:.2f}"
    assert line in str(pruner.report) and json.loads(json.dumps(pruner.report.to_dict()))["rounds"] == rounds
    # The samples of a round follow its shares, and their number stays the same.
    assert used[0] == [6, 6] and [sum(counts) for counts in used] == [12, 12, 12] and used[-1][0] > 7
    assert used == [split_samples(12, list(one["shares"].values())) for one in rounds]
    used.clear()
    _, equal = pruned(model, reader, two_domains(rounds=3, num_samples=12))
    assert equal.plan != pruner.plan and equal.report.rounds == [] and "shares" not in str(equal.report)
    assert used == [[6, 6]] * 3


@needs_shared
def test_spare_text_is_other_text_and_on_record():
    reader = stories_model()[1]
    plain, more = (load_domains(two_domains(rounds=2, **fields), reader) for fields in ({}, {"objective": "worst"}))
    for without, domain in zip(plain, more, strict=True):
        assert torch.equal(without.samples, domain.samples) and torch.equal(without.heldout, domain.heldout)
        assert without.spare is None and len(domain.pool) == 8  # never more than all that are run
        assert torch.equal(domain.pool[:4], domain.samples) and domain.portion(6).samples.shape == (6, 96)
        extra = set(domain.documents) - set(without.documents)
        assert extra and not extra & set(domain.heldout_documents)
        entry = Entry.of(domain)
        assert entry.calibration_tokens == entry.evidence_tokens == 8 * 96 and extra <= set(entry.documents)


def test_spare_text_carries_its_mask_and_goes_as_far_as_there_is_some():
    rows = [{"q": f"how many {i}", "a": f"it is {i} and so on"} for i in range(60)]
    answers = {"template": "{q}: {a}", "answers_only": True}
    domains = [DomainConfig("a", rows, **answers), DomainConfig("b", rows[:12], **answers)]
    settings = config(domains=domains, num_samples=4, seq_length=16, rounds=2, objective="worst")
    long, short = load_domains(settings, tokenizer())
    assert len(long.pool) == 4 and 2 <= len(short.pool) < 4
    whole = long.portion(4)
    assert whole.mask.shape == whole.samples.shape and whole.mask.any(1).all() and not whole.mask.all()
    assert torch.equal(long.portion(2).mask, long.mask)


def test_a_perplexity_that_is_no_number_gives_shares_that_are_numbers(monkeypatch):
    monkeypatch.setattr(measure, "perplexity_of", lambda losses: float("nan"))
    run = pruned_on(data_of(config(objective="worst", rounds=3)), build("llama-tied"), {"mlp": 24})
    assert run.report.rounds[0]["perplexity_ratio"] == {"a": inf, "b": inf}
    assert not any(isnan(share) for entry in run.report.rounds for share in entry["shares"].values())
