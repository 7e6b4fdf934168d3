"""Charts place larger losses farther to the right, label the axis, and turn odd names into harmless XML."""

from math import inf, nan
from xml.etree import ElementTree

import pytest
import results
from hypothesis import example, given
from hypothesis import strategies as st

from optimum_structprune.record.figures import LanguageResult
from optimum_structprune.record.report import CurvePoint
from optimum_structprune.saving.chart import NARROW, WIDE, curve_chart, loss_chart, widths_chart


def parts(svg: str, tag: str) -> list[ElementTree.Element]:
    """Return the elements of one kind."""
    return [part for part in ElementTree.fromstring(svg).iter() if part.tag.endswith(f"}}{tag}")]


def dots(svg: str) -> list[tuple[str, float]]:
    """Return the model and the place of each value. Dots of the legend have no title, and do not count."""
    return [(part.get("class"), float(part.get("cx"))) for part in parts(svg, "circle") if len(part)]


def texts(svg: str) -> list[str]:
    """Return all texts of a chart."""
    return [part.text for part in parts(svg, "text")]


@pytest.mark.parametrize("width", [WIDE, NARROW])
@given(
    st.dictionaries(st.text(min_size=1, max_size=30, alphabet="a<&é \"'"), st.floats(0.5, 9), min_size=1, max_size=5),
    st.sampled_from([0.1, 0.0, nan, None]),
    st.floats(0.5, 9),
)
@example({"unseen text, a": 1.0}, None, 2.0)
def test_larger_losses_stand_farther_to_the_right(width, ratios, margin, unseen):
    svg = loss_chart(results.report(ratios, margin=margin, unseen_ratio=unseen).latest(), width)
    assert "<script" not in svg
    assert "href" not in svg
    assert "prefers-color-scheme:dark" in svg

    values = list(ratios.values()) + [unseen]
    places = [place for _, place in dots(svg)]
    assert len(places) == len(values)
    assert all(100 < place < width - 40 for place in places)

    by_value = sorted(zip(values, places, strict=True))
    assert [place for _, place in by_value] == sorted(places)
    assert ("±" in "".join(texts(svg))) == (margin in (0.1, 0.0))


def test_the_axis_has_round_ticks_and_a_line_for_the_original_model():
    svg = loss_chart(results.report([1.1, 1.6]).latest())
    assert {"1.0×", "1.2×", "1.6×"}.issubset(texts(svg))
    assert {"original", "pruned"}.issubset(texts(svg))
    assert "recovered" not in texts(svg)
    assert [part for part in parts(svg, "path") if part.get("class") == "original"]


def test_a_recovery_shows_the_model_before_and_after():
    report = results.report([1.5], unseen_ratio=2.0)
    report.recovery = results.recovery((1.5, 1.1))
    svg = loss_chart(report.latest())

    pruned, recovered, unseen = dots(svg)
    assert pruned[0] == "pruned"
    assert recovered[0] == "recovered"
    assert unseen[0] == "pruned"
    assert recovered[1] < pruned[1]
    assert {"original", "pruned", "recovered"}.issubset(texts(svg))
    assert "1.10×" in texts(svg)


def test_the_rows_are_named_after_domains_and_languages():
    report = results.report({"customer_support_tickets_of_all_kinds": 1.0, "a\x1b\0b": 1.0})
    report.languages = {"de": LanguageResult(cost=results.cost(1.2)), "fr": LanguageResult(cost=results.cost(1.0))}
    labels = texts(loss_chart(report.latest()))
    assert "German" in labels
    assert "French" not in labels
    assert "customer_support_tick…" in labels
    assert "a\ufffd\ufffdb" in labels


def test_the_chart_of_an_encoder_shows_the_kept_neighbours():
    svg = loss_chart(results.encoder(0.9, 0.8, margin=0.02).latest())
    assert "Neighbours kept" in texts(svg)
    assert "0.80 ± 0.02" in texts(svg)
    assert len(dots(svg)) == 2


def test_nothing_is_drawn_without_a_finite_figure():
    assert loss_chart(results.report([]).latest()) == ""
    assert loss_chart(results.report([inf]).latest()) == ""

    assert curve_chart([]) == ""
    assert curve_chart([CurvePoint(3, 0.5)]) == ""
    assert curve_chart([CurvePoint(3, nan)] * 3) == ""

    report = results.report([1.0])
    report.widths = {"mlp": {0: 4, 1: 4}}
    report.original_widths = {"mlp": 8}
    assert widths_chart(report) == ""


def test_a_curve_falls_where_the_loss_falls():
    svg = curve_chart([CurvePoint(100, 0.6), CurvePoint(200, 0.4), CurvePoint(400, 0.3)])
    places = [(float(part.get("cx")), float(part.get("cy"))) for part in parts(svg, "circle")]
    heights = [height for _, height in places]
    assert places == sorted(places)
    assert heights == sorted(heights)

    labels = texts(svg)
    assert "400" in labels
    assert any("training tokens" in label for label in labels)


def test_the_bars_of_layers_are_as_high_as_their_widths():
    report = results.report([1.0])
    report.widths = {"mlp": {0: 4, 1: 8, 2: 2}}
    report.original_widths = {"mlp": 8}

    bars = [part for part in parts(widths_chart(report), "rect") if part.get("class") == "pruned"]
    heights = [float(bar.get("height")) for bar in bars]
    assert [height / max(heights) for height in heights] == pytest.approx([0.5, 1.0, 0.25], abs=0.01)
