"""Draw the charts of a result as SVG: losses by domain, the training curve, and widths by layer."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from math import ceil, floor, isfinite, log10

from ..config.pruning import LANGUAGES
from ..record.figures import ORIGINAL, PRUNED, RECOVERED, Figure, Measurements, known_languages, ratios_of
from ..record.report import CurvePoint, Report
from ..record.table import margin_digits
from ..record.verdict import LANGUAGE_LIMIT
from ..record.view import UNITS


WIDE, NARROW = 600, 360
ROW_HEIGHT = 26
AXIS_HEIGHT = 44
BAR_HEIGHT = 90
# The width of a character of a label in pixels.
CHARACTER_WIDTH = 7
MAX_LABEL = 22
MAX_LANGUAGES = 6
# The characters that XML does not allow.
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
        group: The heading above the row.
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
        """Return the values and the ends of the interval, which must fit on the axis."""
        ends = list(self.values.values())
        last = ends[-1]
        margin = self.margin or 0.0
        ends += [last - margin, last + margin]
        return ends

    def text(self, unit: str) -> str:
        """Return the last value with its interval."""
        last = list(self.values.values())[-1]
        if self.margin is None:
            return f"{last:.2f}{unit}"
        places = margin_digits(self.margin)
        return f"{last:.{places}f}{unit} ± {self.margin:.{places}f}"


@dataclass(frozen=True)
class Axis:
    """A linear axis.

    Attributes:
        low: The lowest value.
        high: The highest value.
        start: The place of the lowest value in pixels.
        end: The place of the highest value in pixels.
    """

    low: float
    high: float
    start: float
    end: float

    def place(self, value: float) -> float:
        """Return the place of a value in pixels."""
        share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self, count: int) -> list[float]:
        """Return round values along the axis, at most about `count`."""
        min_step = (self.high - self.low) / count
        magnitude = 10 ** floor(log10(min_step))
        step = next(factor * magnitude for factor in (1, 2, 5, 10) if factor * magnitude >= min_step)

        first = ceil(self.low / step - 1e-9)
        last = floor(self.high / step + 1e-9)
        return [round(number * step, 10) for number in range(first, last + 1)]


def loss_chart(table: Measurements, width: int = WIDE) -> str:
    """Draw the losses by domain with an axis: the original, the pruned and the recovered model.

    Args:
        table: The measurements of the latest model.
        width: The width in pixels.

    Returns:
        The SVG, or an empty text where nothing was measured.
    """
    marks = [mark for mark in _marks(table) if all(map(isfinite, mark.ends))]
    if not marks:
        return ""

    unit = "" if table.has_vectors else "×"
    axis = _loss_axis(marks, unit, width)

    rows = ""
    y = 14
    for group, marks_of_group in groupby(marks, lambda mark: mark.group):
        rows += f'<text class="group" x="4" y="{y + 4}">{escape(group)}</text>'
        for mark in marks_of_group:
            y += ROW_HEIGHT
            rows += _row(mark, axis, y, unit, width)
        y += ROW_HEIGHT

    bottom = y - ROW_HEIGHT // 2
    body = _horizontal_axis(axis, bottom, unit, width) + _legend(marks, bottom + 34) + rows
    return _svg(width, bottom + AXIS_HEIGHT, body, "Losses by domain")


def _loss_axis(marks: Sequence[Mark], unit: str, width: int) -> Axis:
    """Return an axis with the values of all rows and the value 1 of the original model, and space for the labels."""
    ends = [1.0]
    for mark in marks:
        ends += mark.ends
    low = min(ends)
    high = max(ends)
    padding = 0.03 * max(high - low, 0.02)

    label_width = 0.28 * width if width >= WIDE else 118
    value_width = CHARACTER_WIDTH * max(len(mark.text(unit)) for mark in marks)
    return Axis(low - padding, high + padding, label_width, width - value_width - 14)


def _marks(table: Measurements) -> list[Mark]:
    """Return the rows of the chart of losses. Of the languages that got worse, the worst come first."""
    marks = []
    for name, domain in table.domains.items():
        neighbours = domain.neighbours
        if neighbours is not None:
            marks.append(Mark("Neighbours kept", name, neighbours.values, neighbours.margin))
    if table.has_vectors:
        return marks

    for name, figure in ratios_of(table.domains).items():
        marks.append(_ratio_mark("Calibration domains", name, figure))
    unseen = table.unseen
    if unseen is not None and unseen.perplexity is not None and unseen.perplexity.ratio is not None:
        marks.append(_ratio_mark("Unseen text", unseen.source, unseen.perplexity))

    known = known_languages(table.languages)
    worse = {code: result.cost for code, result in known.items() if result.is_worse(LANGUAGE_LIMIT)}
    for code, cost in list(worse.items())[:MAX_LANGUAGES]:
        marks.append(_ratio_mark("Languages that got worse", LANGUAGES[code], cost))
    return marks


def _ratio_mark(group: str, label: str, figure: Figure) -> Mark:
    """Return a row of figures relative to the original model."""
    ratios = {model: figure.ratio_of(model) or 0.0 for model in figure.values if model != ORIGINAL}
    return Mark(group, label, ratios, figure.margin)


def _row(mark: Mark, axis: Axis, y: int, unit: str, width: int) -> str:
    """Draw one row: its label, an interval, one dot for each model, and the last value."""
    last_model = list(mark.values)[-1]
    last = mark.values[last_model]
    body = f'<text x="12" y="{y + 4}">{_label(mark.label, width)}</text>'

    if mark.margin is not None:
        start = axis.place(last - mark.margin)
        end = axis.place(last + mark.margin)
        body += f'<path class="margin {last_model}" d="M{start:.1f} {y}H{end:.1f}"/>'

    for name, value in mark.values.items():
        title = f"<title>{NAMES[name]} {value:.3f}</title>"
        body += f'<circle class="{name}" cx="{axis.place(value):.1f}" cy="{y}" r="5">{title}</circle>'

    return body + f'<text x="{axis.end + 10:.0f}" y="{y + 4}">{mark.text(unit)}</text>'


def _label(text: str, width: int) -> str:
    """Return a label that fits in front of the axis."""
    max_length = MAX_LABEL
    if width < WIDE:
        max_length -= 8
    if len(text) > max_length:
        text = f"{text[: max_length - 1]}…"
    return escape(NO_XML.sub("\ufffd", text))


def _horizontal_axis(axis: Axis, bottom: float, unit: str, width: int) -> str:
    """Draw a horizontal axis with its ticks and the line of the original model."""
    num_ticks = 6 if width >= WIDE else 3
    ticks = axis.ticks(num_ticks)
    places = 2
    if len(ticks) > 1:
        places = max(0, -floor(log10(ticks[1] - ticks[0]) + 1e-9))

    body = ""
    for tick in ticks:
        x = axis.place(tick)
        label = f"{tick:.{places}f}{unit}"
        body += f'<path class="grid" d="M{x:.1f} 4V{bottom}"/>'
        body += f'<text class="note" x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{label}</text>'
    return body + f'<path class="original" d="M{axis.place(1.0):.1f} 4V{bottom}"/>'


def _legend(marks: Sequence[Mark], y: float) -> str:
    """Draw the symbols of the original model and of the models in the rows, with their names."""
    body = f'<path class="original" d="M4 {y - 4}h18"/><text class="note" x="27" y="{y}">original</text>'
    x = 92
    for name, label in NAMES.items():
        if any(name in mark.values for mark in marks):
            body += f'<circle class="{name}" cx="{x}" cy="{y - 4}" r="5"/>'
            body += f'<text class="note" x="{x + 9}" y="{y}">{label}</text>'
            x += 68
    return body


def curve_chart(curve: Sequence[CurvePoint], width: int = WIDE) -> str:
    """Draw the validation loss over the training tokens.

    Args:
        curve: The validation losses.
        width: The width in pixels.

    Returns:
        The SVG, or an empty text with fewer than two points.
    """
    points = [point for point in curve if isfinite(point.kl)]
    if len(points) < 2:
        return ""

    height = 200
    x_axis = Axis(0.0, float(max(point.tokens for point in points)), 52, width - 36)
    y_axis = Axis(0.0, max(point.kl for point in points) * 1.08, height, 12)
    num_x_ticks = 5 if width >= WIDE else 3
    body = _curve_ticks(x_axis, y_axis, height, num_x_ticks)

    places = [(x_axis.place(point.tokens), y_axis.place(point.kl)) for point in points]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    body += f'<polyline class="line recovered" style="fill:none" points="{path}"/>'
    for point, (x, y) in zip(points, places, strict=True):
        title = f"<title>{point.tokens:,} tokens: {point.kl:.4f}</title>"
        body += f'<circle class="recovered" cx="{x:.1f}" cy="{y:.1f}" r="4">{title}</circle>'

    title = "KL to the teacher (nats per token) over training tokens"
    body += f'<text class="note" x="4" y="{height + 34}">{title}</text>'
    return _svg(width, height + 42, body, "Validation loss during training")


def _curve_ticks(x_axis: Axis, y_axis: Axis, height: int, num_x_ticks: int) -> str:
    """Draw the ticks of the training curve, with lines across it for the loss."""
    body = ""
    for tick in y_axis.ticks(4):
        y = y_axis.place(tick)
        body += f'<path class="grid" d="M{x_axis.start} {y:.1f}H{x_axis.end}"/>'
        body += f'<text class="note" x="{x_axis.start - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>'

    for tick in x_axis.ticks(num_x_ticks):
        x = x_axis.place(tick)
        body += f'<text class="note" x="{x:.1f}" y="{height + 16}" text-anchor="middle">{tick:,.0f}</text>'
    return body


def widths_chart(report: Report, width: int = WIDE) -> str:
    """Draw the kept width of each layer as bars.

    Args:
        report: The report of a pruning.
        width: The width in pixels.

    Returns:
        The SVG, or an empty text if all layers have the same width.
    """
    uneven = {kind: widths for kind, widths in report.widths.items() if len(set(widths.values())) > 1}
    if not uneven:
        return ""

    body = ""
    top = 0
    for kind, widths in uneven.items():
        full = report.original_widths[kind]
        base = top + 26 + BAR_HEIGHT
        body += f'<text class="group" x="4" y="{top + 16}">{escape(UNITS.get(kind, kind))}, of {full:,}</text>'
        body += _bars(widths, full, base, width)
        top = base + 24

    return _svg(width, top + 4, body, "Kept width by layer")


def _bars(widths: Mapping[int, int], full: int, base: int, width: int) -> str:
    """Draw one bar for each layer, in front of a bar of the full width.

    Args:
        widths: The kept width of each layer.
        full: The full width.
        base: The lower end of the bars in pixels.
        width: The width of the chart in pixels.
    """
    step = (width - 16) / len(widths)
    bar_width = step * 0.8
    max_labels = 16 if width >= WIDE else 8
    label_interval = ceil(len(widths) / max_labels)

    body = ""
    for number, (layer, layer_width) in enumerate(sorted(widths.items())):
        x = 8 + number * step
        height = BAR_HEIGHT * layer_width / full
        size = f'width="{bar_width:.1f}" height="{BAR_HEIGHT}"'
        body += f'<rect class="full" x="{x:.1f}" y="{base - BAR_HEIGHT}" {size}/>'

        size = f'width="{bar_width:.1f}" height="{height:.1f}"'
        title = f"<title>layer {layer}: {layer_width:,}</title>"
        body += f'<rect class="pruned" x="{x:.1f}" y="{base - height:.1f}" {size}>{title}</rect>'

        if number % label_interval == 0:
            middle = x + step * 0.4
            body += f'<text class="note" x="{middle:.1f}" y="{base + 15}" text-anchor="middle">{layer}</text>'
    return body


def _svg(width: int, height: float, body: str, label: str) -> str:
    """Return an SVG that adapts to light and dark colour schemes."""
    size = f'viewBox="0 0 {width} {height:.0f}" width="{width}" role="img" aria-label="{escape(label)}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}><style>{STYLE}</style>{body}</svg>\n'
