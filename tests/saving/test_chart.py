"""The picture of a result shows each kind of text and language where it stands, as XML that nothing runs in."""

from math import nan
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optimum_structprune.saving.card import chart


SVG = "{http://www.w3.org/2000/svg}"


def report(ratios: dict[str, float], margin: float | None = 0.1, other: float | None = None) -> dict:
    """A report of perplexities that grew from 10 by these factors."""
    grown = {name: {"before": 10.0, "after": 10.0 * ratio} for name, ratio in ratios.items()}
    margins = {name: {"ratio": margin} for name in ratios}
    found = {"parameters": {"before": 9, "after": 8}, "perplexity": grown, "perplexity_margin": margins}
    if other is not None:
        text = {"source": "model-written", "tokens": 9, "documents": 9, "margin": {"ratio": margin}}
        found["other"] = {**text, "perplexity": {"before": 10.0, "after": 10.0 * other}}
    return found


def drawn(svg: str) -> list[tuple[str, float, str]]:
    """The colour, the place from the left, and the number of each value, from top to bottom."""
    parts = [*ElementTree.fromstring(svg)]
    circles = [place for place, part in enumerate(parts) if part.tag == f"{SVG}circle"]
    return [(parts[place].get("fill"), float(parts[place].get("cx")), parts[place + 1].text) for place in circles]


@given(
    st.dictionaries(st.text(min_size=1, max_size=30, alphabet="a<&é \"'"), st.floats(0.5, 9), min_size=1, max_size=5),
    st.sampled_from([0.1, 0.0, nan, None]),
    st.floats(0.5, 9),
)
def test_what_loses_more_stands_farther_right_and_other_text_has_its_own_colour(ratios, margin, other):
    marks = drawn(chart(report(ratios, margin, other)))
    values = [*ratios.values(), other]
    assert len(marks) == len(values) and len({colour for colour, *_ in marks}) == 2
    assert marks[-1][0] != marks[0][0] and all(100 < place < 260 for _, place, _ in marks)
    by_value = sorted(zip(values, (place for _, place, _ in marks), strict=True))
    assert [place for _, place in by_value] == sorted(place for _, place in by_value)
    assert all(("±" in number) == bool(margin and margin == margin) for *_, number in marks)


def test_languages_that_lose_are_drawn_and_those_that_do_not_are_not():
    languages = {code: {"before": 1.0, "after": after, "wanted": False} for code, after in (("de", 1.2), ("fr", 1.0))}
    svg = chart({**report({"a": 1.0}), "languages": languages})
    assert "German" in svg and "French" not in svg and len(drawn(svg)) == 2


def test_an_encoder_shows_its_cosines_by_kind_and_language():
    cosines = {"de": 0.9, "ru": 0.7}
    languages = {
        code: {"before": 9, "after": 9, "wanted": True, "cosine": value, "cosine_margin": 0.01}
        for code, value in cosines.items()
    }
    vectors = {"a": {"before": {}, "after": {"cosine": 0.99, "cosine_margin": 0.002}}}
    svg = chart({"embeddings": vectors, "languages": languages, "parameters": {"before": 9, "after": 8}})
    assert [number for *_, number in drawn(svg)] == ["0.990 ± 0.002", "0.70 ± 0.01", "0.90 ± 0.01"]


def test_a_trained_model_is_drawn_as_it_is_after_the_training():
    trained = {"perplexity": {"a": {"dense": 10.0, "pruned": 15.0, "recovered": 11.0}}}
    assert [number for *_, number in drawn(chart({**report({"a": 1.5}, other=2.0), "recovery": trained}))] == ["1.10"]


@pytest.mark.parametrize("nothing", [{}, report({}), report({"a": float("inf")})])
def test_nothing_is_drawn_of_nothing(nothing):
    assert chart(nothing) == ""


def test_it_needs_no_program_and_no_other_file():
    svg = chart(report({"<script>": 1.0}, other=1.2))
    assert "<script" not in svg and "href" not in svg and "prefers-color-scheme:dark" in svg
