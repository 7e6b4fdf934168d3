"""How far a limit on perplexity lets pruning go, and what counts as held."""

from math import isnan

import pytest
from helpers import evidence_of, pruned_on
from models import build, config

from optimum_structprune import StructPruneError
from optimum_structprune.pruning.measure import Measure


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
    evidence = evidence_of(config(max_perplexity_ratio=1.2, rounds=rounds, round_to=1))
    run = pruned_on(evidence, build("llama-tied"), {"mlp": 24})
    assert run.model.config.intermediate_size == narrowest == min(width for width in tried if width >= narrowest)
    assert len(set(tried)) == len(tried) <= rounds + 4, "nothing is tried twice"
    assert [entry["holds"] for entry in run.report.rounds] == [width >= narrowest for width in tried]


def test_only_multiples_and_legal_widths_lie_on_the_way(monkeypatch):
    monkeypatch.setattr(Measure, "ratios", lambda self, model, arch: {"a": 9.0})
    evidence = evidence_of(config(max_perplexity_ratio=1.2, round_to=8, rounds=2))
    with pytest.raises(StructPruneError, match="max_perplexity_ratio=1.2 is not held.*'mlp': 32, 'attention': 4"):
        pruned_on(evidence, build("llama-tied"), {"mlp": 16, "attention": 1})


# --- what counts as held


@pytest.mark.parametrize(
    "first", [{"a": 1.1, "b": float("nan")}, {"a": float("nan"), "b": 1.1}, {"a": 1.1, "b": float("inf")}]
)
def test_a_perplexity_that_is_no_number_never_holds(first, monkeypatch):
    """Whatever the order of the domains: a maximum would pass over a NaN in some of them."""
    ratios = iter([first])
    monkeypatch.setattr(Measure, "ratios", lambda self, model, arch: next(ratios, {"a": 1.1, "b": 1.1}))
    evidence = evidence_of(config(max_perplexity_ratio=1.2, round_to=1))
    run = pruned_on(evidence, build("llama-tied"), {"mlp": 24})
    rounds = run.report.rounds
    assert [entry["holds"] for entry in rounds] == [False, *[True] * (len(rounds) - 1)] and len(rounds) > 2
    assert rounds[0]["widths"] == {"mlp": 24} and rounds[0]["perplexity_ratio"] == pytest.approx(first, nan_ok=True)
    # Every try between the dense model and the one that was not held has held, so the last is one unit above it.
    assert run.model.config.intermediate_size == 25
    assert not any(isnan(share) for entry in rounds for share in entry["shares"].values())
