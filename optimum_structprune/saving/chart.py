"""Draw the charts of a result as SVG: losses by domain, the training curve, and widths by layer."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, floor, isfinite, log10
from typing import Any

from ..config.pruning import LANGUAGES
from ..record.figures import ORIGINAL, PRUNED, RECOVERED, Figure, Measurements, ratios_of, worse_languages
from ..record.report import CurvePoint, Report
from ..record.table import margin_digits
from ..record.verdict import LANGUAGE_LIMIT
from ..record.view import UNITS
from .view import templates


WIDE, NARROW = 600, 360
ROW_HEIGHT = 26
BAR_HEIGHT = 90
CURVE_HEIGHT = 200
# The width of a character of a label in pixels.
CHARACTER_WIDTH = 7
MAX_LABEL = 22
MAX_LANGUAGES = 6
# The characters that XML does not allow.
NO_XML = re.compile(r"[\0-\b\x0b\x0c\x0e-\x1f\ufffe\uffff]")
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
        last = self.values[self.model]
        if self.margin is None:
            return f"{last:.2f}{unit}"
        places = margin_digits(self.margin)
        return f"{last:.{places}f}{unit} ± {self.margin:.{places}f}"

    @property
    def model(self) -> str:
        """Return the name of the last model."""
        return list(self.values)[-1]


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

    groups: dict[str, list[Mark]] = {}
    for mark in marks:
        groups.setdefault(mark.group, []).append(mark)

    unit = "" if table.has_vectors else "×"
    axis = _loss_axis(marks, unit, width)
    ticks = axis.ticks(6 if width >= WIDE else 3)
    places = 2
    if len(ticks) > 1:
        places = max(0, -floor(log10(ticks[1] - ticks[0]) + 1e-9))

    return _drawn(
        "losses",
        width,
        groups=groups,
        models=[model for model in (PRUNED, RECOVERED) if any(model in mark.values for mark in marks)],
        unit=unit,
        axis=axis,
        ticks=ticks,
        places=places,
        bottom=1 + ROW_HEIGHT * (len(marks) + len(groups)),
        row_height=ROW_HEIGHT,
    )


def _drawn(chart: str, width: int, **values: Any) -> str:
    """Return the SVG of a chart. `chart.svg.jinja` explains its values."""
    return CHART.render(chart=chart, width=width, style=STYLE, **values) + "\n"


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
    unseen = table.unseen_perplexity
    if table.unseen is not None and unseen is not None and unseen.ratio is not None:
        marks.append(_ratio_mark("Unseen text", table.unseen.source, unseen))

    worse = worse_languages(table.languages, LANGUAGE_LIMIT)
    for code, result in list(worse.items())[:MAX_LANGUAGES]:
        marks.append(_ratio_mark("Languages that got worse", LANGUAGES[code], result.cost))
    return marks


def _ratio_mark(group: str, label: str, figure: Figure) -> Mark:
    """Return a row of figures relative to the original model."""
    ratios = {model: figure.ratio_of(model) or 0.0 for model in figure.values if model != ORIGINAL}
    return Mark(group, label, ratios, figure.margin)


def label(text: str, width: int) -> str:
    """Return a label that fits in front of the axis."""
    max_length = MAX_LABEL
    if width < WIDE:
        max_length -= 8
    if len(text) > max_length:
        text = f"{text[: max_length - 1]}…"
    return NO_XML.sub("\ufffd", text)


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

    return _drawn(
        "curve",
        width,
        points=points,
        x_axis=Axis(0.0, float(max(point.tokens for point in points)), 52, width - 36),
        y_axis=Axis(0.0, max(point.kl for point in points) * 1.08, CURVE_HEIGHT, 12),
        num_ticks=5 if width >= WIDE else 3,
        height=CURVE_HEIGHT,
    )


def widths_chart(report: Report, width: int = WIDE) -> str:
    """Draw the kept width of each layer as bars.

    Args:
        report: The report of a pruning.
        width: The width in pixels.

    Returns:
        The SVG, or an empty text if all layers have the same width.
    """
    spaces = []
    for kind, widths in report.widths.items():
        if len(set(widths.values())) > 1:
            spaces.append((UNITS.get(kind, kind), report.original_widths[kind], widths))
    if not spaces:
        return ""
    return _drawn("widths", width, spaces=spaces, num_labels=16 if width >= WIDE else 8, bar_height=BAR_HEIGHT)


def fixed(value: float, places: int) -> str:
    """Return a number with some decimal places."""
    return f"{value:,.{places}f}"


ENVIRONMENT = templates(autoescape=True)
ENVIRONMENT.filters.update(short=label, fixed=fixed, px="{:.1f}".format)
CHART = ENVIRONMENT.get_template("chart.svg.jinja")
