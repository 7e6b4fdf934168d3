"""How far a limit on perplexity lets pruning go: the search itself, and what counts as held."""

from math import ceil, isnan, log2

import pytest
from helpers import evidence_of, pruned_on
from hypothesis import given, settings
from hypothesis import strategies as st
from models import build, config

from optimum_structprune import StructPruneError
from optimum_structprune.arch.load import describe
from optimum_structprune.pruning.floor import between, full_widths, halfway, search
from optimum_structprune.pruning.measure import Measure


SIZE = 64  # the full width, in the tests of the search


@st.composite
def problems(draw):
    """A falling course below the full width, how many of its steps are known to hold, and the least that does."""
    course = sorted(draw(st.sets(st.integers(1, SIZE - 1), min_size=1, max_size=6)), reverse=True)
    known = draw(st.integers(0, len(course)))
    limit = draw(st.integers(1, course[known - 1] if known else SIZE))
    return course, known, limit


def searched(course, known, limit, multiple=1):
    tried = []

    def holds(width):
        tried.append(width)
        return width >= limit

    def middle(high, low):
        width = between(SIZE if high is None else high, low, multiple)
        return None if width in (SIZE if high is None else high, low) else width

    return search(course[known:], course[known - 1] if known else None, middle, holds), tried


@settings(deadline=None, max_examples=300)
@given(problem=problems())
def test_the_furthest_that_holds_is_found(problem):
    course, known, limit = problem
    found, tried = searched(course, known, limit)
    # Everything down to the last step may be chosen, but nothing below it and not the dense model.
    expected = [width for width in range(course[-1], SIZE) if width >= limit]
    if known:
        assert found == min(expected)
    else:
        assert found == (min(expected) if expected else None)
    assert len(set(tried)) == len(tried), "nothing is tried twice"
    widest = max(high - low for high, low in zip([SIZE, *course], course, strict=False))
    assert len(tried) <= len(course) - known + ceil(log2(widest)) + 1


@settings(deadline=None, max_examples=100)
@given(problem=problems(), multiple=st.integers(2, 16))
def test_only_multiples_lie_halfway(problem, multiple):
    course, known, limit = problem
    found, tried = searched(course, known, limit, multiple)
    assert all(width in course or width % multiple == 0 for width in tried)
    allowed = {*course, *(width for width in range(course[-1], SIZE) if width % multiple == 0)}
    expected = [width for width in allowed if width >= limit]
    assert found == (min(expected) if expected else None)


def test_a_course_that_holds_to_its_end_takes_no_more_tries():
    tried = []
    assert (
        search([3, 2, 1], None, lambda high, low: pytest.fail("nothing to halve"), lambda w: not tried.append(w)) == 1
    )
    assert tried == [3, 2, 1]
    assert search([], 5, lambda high, low: pytest.fail("nothing to halve"), lambda w: pytest.fail("tried")) == 5


def test_what_is_not_monotone_still_ends_and_holds():
    """A narrower model may be better by chance; what comes out has held in any case."""
    good = {40, 12}
    tried = []

    def holds(width):
        tried.append(width)
        return width in good

    def middle(high, low):
        width = between(high or SIZE, low, 1)
        return None if width in (high or SIZE, low) else width

    assert search([40, 20, 10], None, middle, holds) in good and len(tried) < 10


@pytest.mark.parametrize(("high", "low", "multiple", "expected"), [
    (172, 96, 64, 128), (172, 100, 8, 136), (172, 168, 8, 172), (160, 152, 8, 160), (9, 8, 1, 9), (10, 8, 1, 9),
    (1536, 1400, 64, 1472), (120, 100, 64, 120), (128, 128, 64, 128),
])  # fmt: skip
def test_halfway(high, low, multiple, expected):
    assert between(high, low, multiple) == expected


@settings(deadline=None, max_examples=200)
@given(low=st.integers(1, 500), gap=st.integers(0, 500), multiple=st.integers(1, 64))
def test_what_lies_between_is_a_multiple_in_between(low, gap, multiple):
    high = low + gap
    width = between(high, low, multiple)
    strictly = [w for w in range(low + 1, high) if w % multiple == 0]
    assert width == high if not strictly else width in strictly


def test_legal_widths_halfway_of_several_spaces():
    model = build("llama-tied")
    arch, settings = describe(model), config(round_to=8)
    target = {"mlp": 16, "attention": 1}
    full = full_widths(arch, target)
    assert full == {"mlp": 40, "attention": 4}
    middle = halfway(settings, model.config, arch, full, target)
    assert middle == {"mlp": 32, "attention": 4}  # 3 heads do not divide the 8 of the queries
    assert halfway(settings, model.config, arch, middle, target) == {"mlp": 24, "attention": 4}
    assert halfway(settings, model.config, arch, {"mlp": 24, "attention": 2}, target) is None
    by_layer = {"mlp": {0: 16, 1: 40}}
    assert full_widths(arch, by_layer) == {"mlp": {0: 40, 1: 40}}
    assert halfway(settings, model.config, arch, full_widths(arch, by_layer), by_layer) == {"mlp": {0: 32, 1: 40}}


# --- what counts as held


@pytest.mark.parametrize(
    "first", [{"a": 1.1, "b": float("nan")}, {"a": float("nan"), "b": 1.1}, {"a": 1.1, "b": float("inf")}]
)
def test_a_perplexity_that_is_no_number_never_holds(first, monkeypatch):
    """Whatever the order of the domains: a maximum would pass over a NaN in some of them."""
    ratios = iter([first])
    monkeypatch.setattr(Measure, "ratios", lambda self, model: next(ratios, {"a": 1.1, "b": 1.1}))
    evidence = evidence_of(config(max_perplexity_ratio=1.2, round_to=1, adaptive_rate=0.0))
    run = pruned_on(evidence, build("llama-tied"), {"mlp": 24})
    rounds = run.report.rounds
    assert [entry["holds"] for entry in rounds] == [False, *[True] * (len(rounds) - 1)] and len(rounds) > 2
    assert rounds[0]["widths"] == {"mlp": 24} and rounds[0]["perplexity_ratio"] == pytest.approx(first, nan_ok=True)
    # Every try between the dense model and the one that was not held has held, so the last is one unit above it.
    assert run.model.config.intermediate_size == 25
    assert not any(isnan(share) for entry in rounds for share in entry["shares"].values())


@pytest.mark.parametrize("order", [("a", "b"), ("b", "a")])
def test_a_floor_that_only_gives_no_numbers_is_out_of_reach(order, monkeypatch):
    monkeypatch.setattr(Measure, "ratios", lambda self, model: dict(zip(order, (1.0, float("nan")), strict=True)))
    evidence = evidence_of(config(max_perplexity_ratio=1.2, round_to=8))
    with pytest.raises(StructPruneError, match="max_perplexity_ratio=1.2 is not held"):
        pruned_on(evidence, build("llama-tied"), {"mlp": 24})
