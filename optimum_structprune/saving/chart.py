"""Draws the charts of a result as SVG: losses by domain, the training curve, and widths by layer."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from math import ceil, floor, isfinite, log10

from ..config.pruning import LANGUAGES
from ..record.figures import PRUNED, RECOVERED, Figure, known_languages, ratios_of
from ..record.report import CurvePoint, Report
from ..record.summary import UNITS
from ..record.table import margin_digits
from ..record.verdict import LANGUAGE_LIMIT, judged_domains, judged_unseen


WIDE, NARROW = 600, 360
ROW_HEIGHT = 26
AXIS_HEIGHT = 44
MAX_LABEL = 22
MAX_LANGUAGES = 6
# The characters that XML cannot hold.
NO_XML = re.compile(r"[\0-\b\x0b\x0c\x0e-\x1f\ufffe\uffff]")
NAMES = {PRUNED: "pruned", RECOVERED: "recovered"}
STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#24292f}.group{font-weight:600}.note{fill:#57606a}"
    ".grid{stroke:#d0d7de}.original{stroke:#57606a;stroke-dasharray:4 3}"
    ".pruned{fill:#d9730d;stroke:#d9730d}.recovered{fill:#2a8f6d;stroke:#2a8f6d}"
    ".line{fill:none;stroke-width:2}.margin{stroke-width:3;opacity:.45}.full{fill:#d0d7de}"
    "@media(prefers-color-scheme:dark){text{fill:#e6edf3}.note{fill:#9198a1}.grid{stroke:#3d444d}"
    ".original{stroke:#9198a1}.full{fill:#3d444d}}"
)


@dataclass(frozen=True)
class Mark:
    """One row of a chart.

    Attributes:
        group: The heading of the rows that it belongs to.
        label: The name of the row.
        values: The value of each model, by `pruned` and `recovered`.
        margin: Half the width of the confidence interval of the last value.
    """

    group: str
    label: str
    values: Mapping[str, float]
    margin: float | None = None

    @property
    def ends(self) -> list[float]:
        """Return all values that the axis must hold."""
        last = list(self.values.values())[-1]
        margin = self.margin or 0.0
        return [*self.values.values(), last - margin, last + margin]


@dataclass(frozen=True)
class Axis:
    """A linear axis.

    Attributes:
        low: The value at the left end.
        high: The value at the right end.
        left: The place of the left end in pixels.
        right: The place of the right end in pixels.
    """

    low: float
    high: float
    left: float
    right: float

    def place(self, value: float) -> float:
        """Return the place of a value in pixels."""
        share = (value - self.low) / (self.high - self.low)
        return self.left + share * (self.right - self.left)

    def ticks(self, count: int) -> list[float]:
        """Return round values along the axis, at most about `count`."""
        step = (self.high - self.low) / count
        magnitude = 10 ** floor(log10(step))
        step = next(factor * magnitude for factor in (1, 2, 5, 10) if factor * magnitude >= step)
        first = ceil(self.low / step - 1e-9)
        last = floor(self.high / step + 1e-9)
        return [round(number * step, 10) for number in range(first, last + 1)]


def loss_chart(report: Report, width: int = WIDE) -> str:
    """Draw the losses by domain with an axis: the original, the pruned and the recovered model.

    Args:
        report: The report of a pruning, with the training after it.
        width: The width in pixels.

    Returns:
        The SVG, or an empty text where nothing was measured.
    """
    marks = [mark for mark in _marks(report) if all(map(isfinite, mark.ends))]
    if not marks:
        return ""

    is_ratio = not any(domain.vectors for domain in report.domains.values())
    ends = [1.0, *(end for mark in marks for end in mark.ends)]
    span = max(max(ends) - min(ends), 0.02)
    left = width * 0.28 if width >= WIDE else 118
    axis = Axis(min(ends) - 0.03 * span, max(ends) + 0.03 * span, left, width - 96)

    body = ""
    y = 14
    for group, rows in groupby(marks, lambda mark: mark.group):
        body += f'<text class="group" x="4" y="{y + 4}">{escape(group)}</text>'
        for mark in rows:
            y += ROW_HEIGHT
            body += _mark(mark, axis, y, is_ratio, width)
        y += ROW_HEIGHT
    bottom = y - ROW_HEIGHT // 2
    unit = "×" if is_ratio else ""
    return _svg(width, bottom + AXIS_HEIGHT, _axis(axis, bottom, unit, width) + body, "Losses by domain")


def _marks(report: Report) -> list[Mark]:
    """Return the rows of the chart of losses."""
    marks = []
    domains = judged_domains(report)
    for name, domain in domains.items():
        if domain.vectors is not None and domain.vectors.neighbours is not None:
            neighbours = domain.vectors.neighbours
            values = {PRUNED: neighbours.pruned or 0.0}
            marks.append(Mark("Neighbours kept", name, values, neighbours.margin))
    for name, figure in ratios_of(domains).items():
        if domains[name].vectors is None:
            marks.append(_ratio_mark("Calibration domains", name, figure))

    unseen = judged_unseen(report)
    if unseen is not None and unseen.perplexity is not None and unseen.perplexity.ratio is not None:
        marks.append(_ratio_mark("Unseen text", unseen.source, unseen.perplexity))

    if not any(domain.vectors for domain in domains.values()):
        worse = [item for item in known_languages(report.languages) if item[1] > LANGUAGE_LIMIT]
        for code, ratio in worse[:MAX_LANGUAGES]:
            marks.append(Mark("Languages that got worse", LANGUAGES[code], {PRUNED: ratio}))
    return marks


def _ratio_mark(group: str, label: str, figure: Figure) -> Mark:
    """Return a row of perplexities relative to the original model."""
    dense = figure.dense or 1.0
    values = {name: value / dense for name, value in figure.by_model().items() if name in NAMES}
    if figure.dense is None:
        values = {RECOVERED: figure.ratio or 0.0}
    return Mark(group, label, values, figure.margin)


def _mark(mark: Mark, axis: Axis, y: int, is_ratio: bool, width: int) -> str:
    """Draw one row: its label, an interval, one dot for each model, and the last value."""
    last_model = list(mark.values)[-1]
    last = mark.values[last_model]
    drawn = f'<text x="12" y="{y + 4}">{_label(mark.label, width)}</text>'
    if mark.margin is not None:
        start = axis.place(last - mark.margin)
        end = axis.place(last + mark.margin)
        drawn += f'<path class="margin {last_model}" d="M{start:.1f} {y}H{end:.1f}"/>'
    for name, value in mark.values.items():
        title = f"<title>{NAMES[name]} {value:.3f}</title>"
        drawn += f'<circle class="{name}" cx="{axis.place(value):.1f}" cy="{y}" r="5">{title}</circle>'

    places = 2 if mark.margin is None else margin_digits(mark.margin)
    text = f"{last:.{places}f}{'×' if is_ratio else ''}"
    if mark.margin is not None:
        text += f" ± {mark.margin:.{places}f}"
    return drawn + f'<text x="{axis.right + 10:.0f}" y="{y + 4}">{text}</text>'


def _label(text: str, width: int) -> str:
    """Return a label that fits beside the axis."""
    longest = MAX_LABEL if width >= WIDE else MAX_LABEL - 8
    shown = text if len(text) <= longest else f"{text[: longest - 1]}…"
    return escape(NO_XML.sub("\ufffd", shown))


def _axis(axis: Axis, bottom: float, unit: str, width: int) -> str:
    """Draw a horizontal axis with its ticks, the line of the original model, and the legend."""
    drawn = ""
    ticks = axis.ticks(6 if width >= WIDE else 3)
    places = max(0, -floor(log10(ticks[1] - ticks[0]) + 1e-9)) if len(ticks) > 1 else 2
    for tick in ticks:
        x = axis.place(tick)
        drawn += f'<path class="grid" d="M{x:.1f} 4V{bottom}"/>'
        drawn += (
            f'<text class="note" x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{tick:.{places}f}{unit}</text>'
        )
    x = axis.place(1.0)
    drawn += f'<path class="original" d="M{x:.1f} 4V{bottom}"/>'

    y = bottom + 34
    drawn += f'<path class="original" d="M4 {y - 4}h18"/><text class="note" x="27" y="{y}">original</text>'
    drawn += f'<circle class="pruned" cx="92" cy="{y - 4}" r="5"/><text class="note" x="101" y="{y}">pruned</text>'
    drawn += f'<circle class="recovered" cx="160" cy="{y - 4}" r="5"/>'
    return drawn + f'<text class="note" x="169" y="{y}">recovered</text>'


def curve_chart(curve: Sequence[CurvePoint], width: int = WIDE) -> str:
    """Draw the validation loss over the training tokens; empty with fewer than two points."""
    points = [point for point in curve if isfinite(point.kl)]
    if len(points) < 2:
        return ""

    height = 200
    x_axis = Axis(0.0, float(max(point.tokens for point in points)), 52, width - 20)
    y_axis = Axis(0.0, max(point.kl for point in points) * 1.08, height, 12)
    drawn = ""
    for tick in y_axis.ticks(4):
        y = y_axis.place(tick)
        drawn += f'<path class="grid" d="M{x_axis.left} {y:.1f}H{x_axis.right}"/>'
        drawn += f'<text class="note" x="{x_axis.left - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>'
    for tick in x_axis.ticks(5 if width >= WIDE else 3):
        x = x_axis.place(tick)
        drawn += f'<text class="note" x="{x:.1f}" y="{height + 16}" text-anchor="middle">{tick:,.0f}</text>'

    path = " ".join(f"{x_axis.place(point.tokens):.1f},{y_axis.place(point.kl):.1f}" for point in points)
    drawn += f'<polyline class="line recovered" style="fill:none" points="{path}"/>'
    for point in points:
        x = x_axis.place(point.tokens)
        y = y_axis.place(point.kl)
        title = f"<title>{point.tokens:,} tokens: {point.kl:.4f}</title>"
        drawn += f'<circle class="recovered" cx="{x:.1f}" cy="{y:.1f}" r="4">{title}</circle>'
    title = "KL to the teacher (nats per token) over training tokens"
    drawn += f'<text class="note" x="{x_axis.left}" y="{height + 34}">{title}</text>'
    return _svg(width, height + 42, drawn, "Validation loss during training")


def widths_chart(report: Report, width: int = WIDE) -> str:
    """Draw the kept width of each layer as bars; empty where all layers have the same width."""
    uneven = {kind: widths for kind, widths in report.widths.items() if len(set(widths.values())) > 1}
    if not uneven:
        return ""

    height = 90
    drawn = ""
    top = 0
    for kind, by_layer in uneven.items():
        full = report.dense_widths[kind]
        drawn += f'<text class="group" x="4" y="{top + 16}">{escape(UNITS.get(kind, kind))}, of {full:,}</text>'
        base = top + 26 + height
        step = (width - 16) / len(by_layer)
        for number, (layer, kept) in enumerate(sorted(by_layer.items())):
            x = 8 + number * step
            bar = height * kept / full
            title = f"<title>layer {layer}: {kept:,}</title>"
            drawn += f'<rect class="full" x="{x:.1f}" y="{base - height}" width="{step * 0.8:.1f}" height="{height}"/>'
            drawn += (
                f'<rect class="pruned" x="{x:.1f}" y="{base - bar:.1f}" width="{step * 0.8:.1f}" '
                f'height="{bar:.1f}">{title}</rect>'
            )
            if number % ceil(len(by_layer) / (16 if width >= WIDE else 8)) == 0:
                middle = x + step * 0.4
                drawn += f'<text class="note" x="{middle:.1f}" y="{base + 15}" text-anchor="middle">{layer}</text>'
        top = base + 24
    return _svg(width, top + 4, drawn, "Kept width by layer")


def _svg(width: int, height: float, body: str, label: str) -> str:
    """Return an SVG that adapts to light and dark."""
    size = f'viewBox="0 0 {width} {height:.0f}" width="{width}" role="img" aria-label="{escape(label)}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}><style>{STYLE}</style>{body}</svg>\n'
