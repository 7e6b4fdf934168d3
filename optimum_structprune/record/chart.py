"""Draws how much a model has lost, by kind of text and by language, as one SVG picture for light and dark pages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape
from math import isfinite
from textwrap import shorten
from typing import Any

from ..config.pruning import LANGUAGES
from .remarks import LOSES, MOST_SHOWN, judged, known_ratios
from .table import RATIO, as_number, quality_rows


CHART_NAME = "chart.svg"
LEFT, RIGHT, LINE = 112, 244, 22  # the ends of the scale and the height of a row, in pixels of a picture 360 wide
KINDS, OTHER = "calibrated on: perplexity, × dense", "other text: perplexity, × dense"
COLOURS = {KINDS: "#2a8f6d", OTHER: "#d9730d"}
STYLE = (
    "text{font:12px sans-serif;fill:#24292f}.group{font-weight:600}"
    "@media(prefers-color-scheme:dark){text{fill:#d1d7de}}"
)


def chart(report: Mapping[str, Any]) -> str:
    """Draws the losses in a report as SVG; empty where nothing was measured."""
    marks = [
        (group, name, value, margin if margin is not None and isfinite(margin) else 0.0)
        for group, name, value, margin in _marks(report)
    ]
    low = min((value - margin for *_, value, margin in marks), default=1.0)
    high = max((value + margin for *_, value, margin in marks), default=1.0)
    low, scale = min(low, 1.0), (RIGHT - LEFT) / (max(high, 1.0, low + 0.01) - min(low, 1.0))
    dense, y, last, drawn = LEFT + (1 - low) * scale, 0, "", ""
    for group, name, value, margin in marks:
        if group != last:
            last, y = group, y + LINE
            drawn += f'<text class="group" x="8" y="{y + 4}">{escape(group)}</text>'
        y, x, reach, colour = y + LINE, LEFT + (value - low) * scale, margin * scale, COLOURS.get(group, "#4c7fd1")
        drawn += (
            f'<text x="16" y="{y + 4}">{escape(shorten(name, 15, placeholder="…"))}</text>'
            f'<path d="M{dense:.1f} {y - 9}v18" stroke="#8c959f" stroke-dasharray="3 3"/>'
            f'<path d="M{x - reach:.1f} {y}H{x + reach:.1f}" stroke="{colour}" stroke-width="3" opacity=".5"/>'
            f'<circle cx="{x:.1f}" cy="{y}" r="5" fill="{colour}"/>'
            f'<text x="{RIGHT + 14}" y="{y + 4}">{as_number(value, margin or None, 2)}</text>'
        )
    size = f'viewBox="0 0 360 {y + 42}" width="360" role="img" aria-label="What was lost"'
    note = f'<text x="8" y="{y + 32}">dashed: dense model; bars hold the truth 9 times in 10</text>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}><style>{STYLE}</style>{drawn}{note}</svg>\n' * bool(marks)


def _marks(report: Mapping[str, Any]) -> Iterator[tuple[str, str, float, float | None]]:
    """Yields the group, name, value and margin of error of each kind of text and of some languages.

    The languages are those that lose most.
    """
    for row in quality_rows(judged(report)):
        figure, _, name = row.label.partition(" ")
        if figure == "perplexity" and row.change == RATIO and row.ratio:
            group = OTHER if name.startswith("other text, ") else KINDS
            yield group, name.removeprefix("other text, "), row.ratio, row.margins[-1] if row.margins else None
    by_domain, by_code = report.get("embeddings") or {}, report.get("languages") or {}
    cosines = {code: of for code, of in by_code.items() if of.get("cosine")}
    lowest = sorted(cosines, key=lambda code: cosines[code]["cosine"])[:MOST_SHOWN]
    vectors = [("cosine to the dense model", name, of["after"]) for name, of in by_domain.items()]
    vectors += [("cosine by language, lowest first", LANGUAGES[code], cosines[code]) for code in lowest]
    for group, name, near in vectors:
        if near.get("cosine"):
            yield group, name, near["cosine"], near.get("cosine_margin")
    losing = [pair for pair in known_ratios(by_code).items() if pair[1] > LOSES] if by_code and not cosines else []
    yield from (("languages that lose, × dense", LANGUAGES[code], ratio, None) for code, ratio in losing[:MOST_SHOWN])
