"""Charts: larger losses stand farther to the right, the axis is labelled, and odd names are harmless XML."""

from math import inf, nan
from xml.etree import ElementTree

import pytest
import results
from hypothesis import example, given
from hypothesis import strategies as st

from optimum_structprune.record.figures import Figure, LanguageResult
from optimum_structprune.record.report import CurvePoint
from optimum_structprune.saving.chart import NARROW, WIDE, curve_chart, loss_chart, widths_chart


def parts(svg: str, tag: str) -> list[ElementTree.Element]:
    """Return the elements of one kind."""
    return [part for part in ElementTree.fromstring(svg).iter() if part.tag.endswith(f"}}{tag}")]


def dots(svg: str) -> list[tuple[str, float]]:
    """Return the model and the place of each value; those of the legend have no title."""
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
    svg = loss_chart(results.report(ratios, margin=margin, unseen_ratio=unseen), width)
    assert "<script" not in svg and "href" not in svg and "prefers-color-scheme:dark" in svg
    marks = dots(svg)
    values = [*ratios.values(), unseen]
    assert len(marks) == len(values)
    assert all(100 < place < width - 80 for _, place in marks)
    by_value = sorted(zip(values, (place for _, place in marks), strict=True))
    assert [place for _, place in by_value] == sorted(place for _, place in by_value)
    assert ("±" in "".join(texts(svg))) == (margin in (0.1, 0.0))


def test_the_axis_has_round_ticks_and_a_line_for_the_original_model():
    svg = loss_chart(results.report([1.1, 1.6]))
    assert {"1.0×", "1.2×", "1.6×"} <= {*texts(svg)}
    assert {"original", "pruned", "recovered"} <= {*texts(svg)}
    assert [part for part in parts(svg, "path") if part.get("class") == "original"]


def test_a_recovery_shows_the_model_before_and_after():
    report = results.report([1.5], unseen_ratio=2.0)
    report.recovery = results.recovery((1.5, 1.1))
    svg = loss_chart(report)
    (before, place), (after, better), (unseen, _) = dots(svg)
    assert (before, after, unseen) == ("pruned", "recovered", "pruned")
    assert better < place
    assert "1.10×" in texts(svg)


def test_the_rows_of_other_results():
    report = results.report({"customer_support_tickets_of_all_kinds": 1.0, "a\x1b\0b": 1.0})
    report.languages = {"de": LanguageResult(Figure(1.0, 1.2)), "fr": LanguageResult(Figure(1.0, 1.0))}
    shown = texts(loss_chart(report))
    assert "German" in shown and "French" not in shown
    assert "customer_support_tick…" in shown and "a\ufffd\ufffdb" in shown

    svg = loss_chart(results.encoder(0.9, 0.8, margin=0.02))
    assert "Neighbours kept" in texts(svg) and "0.80 ± 0.02" in texts(svg)
    assert len(dots(svg)) == 2


def test_nothing_is_drawn_without_a_finite_figure():
    assert "" == loss_chart(results.report([])) == loss_chart(results.report([inf]))
    assert "" == curve_chart([]) == curve_chart([CurvePoint(3, 0.5)]) == curve_chart([CurvePoint(3, nan)] * 3)
    report = results.report([1.0])
    report.widths, report.dense_widths = {"mlp": {0: 4, 1: 4}}, {"mlp": 8}
    assert widths_chart(report) == ""


def test_a_curve_falls_where_the_loss_falls():
    svg = curve_chart([CurvePoint(100, 0.6), CurvePoint(200, 0.4), CurvePoint(400, 0.3)])
    places = [(float(part.get("cx")), float(part.get("cy"))) for part in parts(svg, "circle")]
    assert places == sorted(places) and [y for _, y in places] == sorted(y for _, y in places)
    assert "400" in texts(svg) and any("training tokens" in text for text in texts(svg))


def test_the_bars_of_layers_are_as_high_as_their_widths():
    report = results.report([1.0])
    report.widths, report.dense_widths = {"mlp": {0: 4, 1: 8, 2: 2}}, {"mlp": 8}
    heights = [
        float(part.get("height")) for part in parts(widths_chart(report), "rect") if part.get("class") == "pruned"
    ]
    assert [height / max(heights) for height in heights] == pytest.approx([0.5, 1.0, 0.25], abs=0.01)
