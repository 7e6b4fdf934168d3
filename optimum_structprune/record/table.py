"""The formats of numbers, and tables as text and as Markdown."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from math import floor, isfinite, log10
from statistics import fmean
from typing import Any

from ..system.margins import MANY_DOCUMENTS
from .figures import ORIGINAL, Figure


UNKNOWN = "–"
MAX_DIGITS = 3
# The units of byte sizes, the largest first.
BYTE_UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
# The active characters of Markdown, and the parts of addresses that GitHub and the Hub turn into links.
MARKUP = re.compile(r"[\\`*_~\[\]<&|$@]|:(?=//)|(?<=www)\.", re.IGNORECASE)


def change_row(
    label: str,
    before: float | Sequence[float] | None,
    after: float | Sequence[float] | None,
    show: Callable[[Any], str] | None = None,
) -> list[str]:
    """Return a row with two values and the relative change, which is empty if it is not known.

    Args:
        label: The first cell.
        before: A number, several numbers, which are shown as a range, or None where it is unknown.
        after: The same after the change.
        show: The format of a value; by default `number`.
    """
    first = _mean(before)
    last = _mean(after)
    change = ""
    if first and last is not None:
        change = percent_change(last / first)

    show = show or number
    return [label, show(before), show(after), change]


def _mean(value: float | Sequence[float] | None) -> float | None:
    """Return a number, or the mean of several numbers."""
    if isinstance(value, Sequence):
        return fmean(value)
    return value


def number(value: float | Sequence[float] | None, digits: int = 0) -> str:
    """Format a number, or the ends of a range: `1,536`, `1,024-1,536`."""
    if value is None:
        return UNKNOWN

    if isinstance(value, Sequence):
        ends = sorted({min(value), max(value)})
        return "-".join(f"{end:,.{digits}f}" for end in ends)
    return f"{value:,.{digits}f}"


def with_margin(value: float, margin: float | None, digits: int = MAX_DIGITS) -> str:
    """Format a value with its confidence interval: `0.95 ± 0.02`.

    The decimal places end at the first digit of the margin.
    """
    if margin is None or not isfinite(margin):
        return f"{value:,.{digits}f}"

    places = margin_digits(margin)
    return f"{value:,.{places}f} ± {margin:.{places}f}"


def margin_digits(margin: float) -> int:
    """Return the number of decimal places up to the first digit of a margin, at most 3."""
    if margin <= 0:
        return MAX_DIGITS
    return min(max(-floor(log10(margin)), 0), MAX_DIGITS)


def value_text(figure: Figure | None) -> str:
    """Format the ratio to the original, or else the last value of a figure, with its interval: `0.95 ± 0.02`."""
    if figure is None or figure.last is None:
        return UNKNOWN
    if figure.ratio is not None:
        return ratio_text(figure)
    return with_margin(figure.last, figure.margin)


def vector_text(figure: Figure | None) -> str:
    """Format a figure of the pruned and the recovered model, with the last interval: `0.931 → 0.95 ± 0.02`."""
    if figure is None:
        return UNKNOWN
    figures = [figure.of_model(model) for model in figure.values if model != ORIGINAL]
    return " → ".join(map(value_text, figures)) or UNKNOWN


def ratio_text(figure: Figure, documents: int | None = None) -> str:
    """Format the ratio of a figure to the original model: `1.39× ± 0.08`, or `1.4× (few documents)`."""
    return UNKNOWN if figure.ratio is None else times(figure.ratio, figure.margin, documents)


def times(ratio: float, margin: float | None = None, documents: int | None = None) -> str:
    """Format a ratio: `1.39× ± 0.08`; fewer than 12 documents are mentioned."""
    if not isfinite(ratio):
        return "infinite"

    has_few_documents = documents is not None and 0 < documents < MANY_DOCUMENTS
    if margin is not None and isfinite(margin):
        places = margin_digits(margin)
        text = f"{ratio:,.{places}f}× ± {margin:.{places}f}"
    elif has_few_documents:
        text = f"{ratio:,.1f}×"
    else:
        text = f"{ratio:,.{MAX_DIGITS}f}×"

    if has_few_documents:
        text += " (few documents)"
    return text


def percent_change(ratio: float) -> str:
    """Format a relative change: `-20.8%`."""
    return f"{ratio - 1:+.1%}"


def byte_size(count: float) -> str:
    """Format a number of bytes in decimal units: `269 MB`."""
    for unit, name in BYTE_UNITS:
        if count >= unit:
            digits = 0 if count >= 100 * unit else 1
            return f"{count / unit:,.{digits}f} {name}"
    return f"{count:,.0f} bytes"


def aligned(table: Sequence[Sequence[str]]) -> str:
    """Return a table as lines of text. The first column is aligned to the left, the others to the right.

    Args:
        table: The rows, all with the same number of cells.
    """
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = []

    for row in table:
        cells = [row[0].ljust(widths[0])]
        for cell, width in zip(row[1:], widths[1:], strict=True):
            cells.append(cell.rjust(width))
        lines.append("  ".join(cells).rstrip())

    return "\n".join(lines)


def escaped(text: str) -> str:
    """Return text as Markdown that shows the same text in one line."""
    return MARKUP.sub(r"\\\g<0>", re.sub(r"\s+", " ", text))


def markdown(table: Sequence[Sequence[str]]) -> str:
    """Return a table as Markdown.

    Args:
        table: The rows, all with the same number of cells. The first row is the head.
    """
    lines = [f"| {' | '.join(map(escaped, row))} |" for row in table]
    lines.insert(1, f"|{'---|' * len(table[0])}")
    return "\n".join(lines)
