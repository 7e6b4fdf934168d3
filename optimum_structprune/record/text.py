"""Numbers as text: tables, times, and widths as bars."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise, zip_longest
from math import ceil, floor, isfinite, log10
from statistics import fmean
from typing import Any


SHOWN = 3  # answers in a card or a page
BARS = "▁▂▃▄▅▆▇█"
LONGEST_SPARK = 32
# What is more than text in one line of Markdown, with the addresses that GitHub's and the Hub's make links of.
ACTIVE = re.compile(r"[\\`*_~\[\]<&|$@]|:(?=//)|(?<=www)\.", re.IGNORECASE)


def spark_line(shares: Sequence[float]) -> str:
    """Shares from 0 to 1 as a line of bars; of more than `LONGEST_SPARK`, neighbours share a bar of their mean."""
    count = min(len(shares), LONGEST_SPARK)
    ends = [len(shares) * number // count for number in range(count + 1)]
    means = [fmean(shares[start:end]) for start, end in pairwise(ends)]
    return "".join(BARS[min(max(ceil(mean * len(BARS)), 1), len(BARS)) - 1] for mean in means)


def plus_minus(error: float | None, digits: int) -> str:
    """A standard error behind its value; nothing where there is none."""
    return "" if error is None or not isfinite(error) else f" ± {error:.{digits}f}"


def digits_of(error: float | None, most: int) -> int:
    """The digits behind the point that a standard error leaves to its value: those up to its own first one."""
    if error is None or not isfinite(error):
        return most
    return min(max(-floor(log10(error)), 0), 3) if error > 0 else 3


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of equally many cells as lines of text; the first column is aligned left, the others right."""
    sizes = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(sizes[0]), *(cell.rjust(size) for cell, size in zip(row[1:], sizes[1:], strict=True))])
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def escaped(text: str) -> str:
    """A text as Markdown that shows it, in one line, whatever is in it."""
    return ACTIVE.sub(r"\\\g<0>", re.sub(r"\s+", " ", text))


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Rows of equally many cells of text as a Markdown table; the first row is its head."""
    head, *body = [f"| {' | '.join(map(escaped, row))} |" for row in rows]
    return "\n".join([head, f"|{'---|' * len(rows[0])}", *body])


def readable_time(seconds: float) -> str:
    """A time in seconds, or in minutes or hours where it is long."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def sample_items(items: Sequence[Mapping[str, Any]], count: int = SHOWN) -> list[Mapping[str, Any]]:
    """A few items of different outcomes in turn: what the last model has lost, kept, never had and gained."""
    groups: dict[tuple[bool, bool], list[Mapping[str, Any]]] = {
        pair: [] for pair in ((True, False), (True, True), (False, False), (False, True))
    }
    for item in items:
        rights = [answer["right"] for answer in item["answers"].values()]
        groups[rights[0], rights[-1]].append(item)
    in_turn = [item for turn in zip_longest(*groups.values()) for item in turn if item is not None]
    return in_turn[:count]
