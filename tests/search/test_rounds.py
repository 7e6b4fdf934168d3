"""What goes on between rounds: weights of domains, a floor, checkpoints, kept models."""

import json
from math import isnan

import pytest
import torch
from helpers import count_hooks, data_of, pruned_on
from models import build, config, tokenizer
from trained import STORIES, needs_shared, stories_config, stories_model

from optimum_structprune import DomainConfig, StructPruneError, StructPruner
from optimum_structprune.arch.load import describe
from optimum_structprune.arch.shrink import legal_sizes
from optimum_structprune.domains.load import load_domains, split_samples
from optimum_structprune.domains.manifest import Entry
from optimum_structprune.pruning.measure import Measure
from optimum_structprune.sources.data import CalibrationData


def two_domains(**fields):
    code = DomainConfig(name="code", source="builtin:programs")
    short = {"num_samples": 8, "seq_length": 96, **fields}
    return stories_config(domains=[DomainConfig(name="stories", source=str(STORIES)), code], **short)


def pruned(model, reader, settings):
    pruner = StructPruner(settings)
    return pruner.prune_model(model, reader), pruner


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


@needs_shared
@pytest.mark.parametrize("fields", [
    {"rounds": 2, "allocation": "global"},
    {"rounds": 2, "widths": {"attention": 1, "mlp": 96}, "refit": "bias"},
])  # fmt: skip
def test_the_floor_is_held_and_a_further_step_would_not(fields):
    floor = 1.3
    model, reader = stories_model()
    small, pruner = pruned(model, reader, two_domains(max_perplexity_ratio=floor, round_to=8, **fields))
    report, rounds = pruner.report, pruner.report.rounds
    assert max(one["after"] / one["before"] for one in report.perplexity.values()) <= floor
    held, missed = ([one for one in rounds if one["holds"] is holds] for holds in (True, False))
    for one in rounds:
        assert (max(one["perplexity_ratio"].values()) <= floor) is one["holds"]
    for name, widths in report.widths.items():
        nearest = missed[-1]["widths"][name]
        legal = [size for size in legal_sizes(model.config, describe(model), name) if name != "mlp" or size % 8 == 0]
        for layer, width in widths.items():
            less = nearest if isinstance(nearest, int) else nearest[layer]
            assert less <= width and not any(less < between < width for between in legal)
    assert small.num_parameters() < model.num_parameters() and count_hooks(small) == 0
    assert held and "the limit stopped it: the next narrower widths give perplexity stories x" in str(report)


@pytest.mark.parametrize("narrowest", [25, 30, 33, 39])
@pytest.mark.parametrize("rounds", [1, 3])
def test_the_narrowest_that_holds_is_reached_in_few_tries(narrowest, rounds, monkeypatch):
    """Everything down to the target may be chosen, but nothing below it and not the dense model."""
    tried = []

    def ratios(self, model, arch):
        weight = model.model.layers[0].mlp.down_proj.weight
        tried.append(int((weight != 0).any(0).sum()))
        return {"a": 1.0 if tried[-1] >= narrowest else 9.0}

    monkeypatch.setattr(Measure, "ratios", ratios)
    data = data_of(config(max_perplexity_ratio=1.2, rounds=rounds, round_to=1))
    run = pruned_on(data, build("llama-tied"), {"mlp": 24})
    assert run.model.config.intermediate_size == narrowest == min(width for width in tried if width >= narrowest)
    assert len(set(tried)) == len(tried) <= rounds + 4, "nothing is tried twice"
    assert [entry["holds"] for entry in run.report.rounds] == [width >= narrowest for width in tried]


def test_only_multiples_and_legal_widths_lie_on_the_way(monkeypatch):
    monkeypatch.setattr(Measure, "ratios", lambda self, model, arch: {"a": 9.0})
    data = data_of(config(max_perplexity_ratio=1.2, round_to=8, rounds=2))
    with pytest.raises(StructPruneError, match="max_perplexity_ratio=1.2 is not held.*'mlp': 32, 'attention': 4"):
        pruned_on(data, build("llama-tied"), {"mlp": 16, "attention": 1})


@pytest.mark.parametrize(
    "first", [{"a": 1.1, "b": float("nan")}, {"a": float("nan"), "b": 1.1}, {"a": 1.1, "b": float("inf")}]
)
def test_a_perplexity_that_is_no_number_never_holds(first, monkeypatch):
    """Whatever the order of the domains: a maximum would pass over a NaN in some of them."""
    ratios = iter([first])
    monkeypatch.setattr(Measure, "ratios", lambda self, model, arch: next(ratios, {"a": 1.1, "b": 1.1}))
    data = data_of(config(max_perplexity_ratio=1.2, round_to=1))
    run = pruned_on(data, build("llama-tied"), {"mlp": 24})
    rounds = run.report.rounds
    assert [entry["holds"] for entry in rounds] == [False, *[True] * (len(rounds) - 1)] and len(rounds) > 2
    assert rounds[0]["widths"] == {"mlp": 24} and rounds[0]["perplexity_ratio"] == pytest.approx(first, nan_ok=True)
    # Every try between the dense model and the one that was not held has held, so the last is one unit above it.
    assert run.model.config.intermediate_size == 25
    assert not any(isnan(share) for entry in rounds for share in entry["shares"].values())
