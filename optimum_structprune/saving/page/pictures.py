"""The pictures of the page, as SVG text that takes its colours from the page's style.

Matplotlib draws them. It is imported inside, because it is an extra: without it the page has no pictures.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import StringIO
from statistics import fmean
from typing import Any
from xml.etree import ElementTree

from ...record.details import BINS, RANGES, Choice
from .drawing import can_draw as can_draw


SVG = "http://www.w3.org/2000/svg"
ElementTree.register_namespace("", SVG)
ElementTree.register_namespace("xlink", "http://www.w3.org/1999/xlink")
# What stands in the SVG for each colour of the page's style. None is black, which matplotlib leaves out.
COLOURS = {
    "ink": "#010203",
    "muted": "#010204",
    "grid": "#010205",
    "card": "#010206",
    "kept": "#010207",
    "removed": "#010208",
    "recovered": "#010209",
}
INK, MUTED, GRID, CARD, KEPT, REMOVED, RECOVERED = COLOURS.values()
STYLE: dict[str, Any] = {
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "svg.fonttype": "none",  # text stays text, in the fonts of the page
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
    "font.size": 9,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "figure.constrained_layout.use": True,
}
# Inches; a picture of this width is read without scrolling in a window of 400 px.
WIDTH, HEIGHT = 4.0, 2.3
# So many layers have a row of their own; of deeper models, evenly spread layers are shown.
MOST_ROWS = 32
# Up to so many rows do not overlap.
FEW_ROWS = 8
# Ratios that differ by more than this factor are shown on a logarithmic axis.
WIDE = 10
# The longest name that is written out.
LONGEST = 20
# With more pairs of domains than this, each domain gets one row: its mean over the others.
MOST_PAIRS = 15


@contextmanager
def _drawing(name: str, height: float = HEIGHT) -> Iterator[tuple[Any, list[str]]]:
    """Axes to draw on, and a list that holds the SVG afterwards."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    svg: list[str] = []
    style: Any = {**STYLE, "svg.hashsalt": name}
    with rc_context(style):
        figure = Figure(figsize=(WIDTH, height))
        yield figure.add_subplot(), svg
        out = StringIO()
        FigureCanvasSVG(figure).print_svg(out, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg.append(_for_page(out.getvalue(), name))


def _for_page(svg: str, name: str) -> str:
    """An SVG document as an element of the page: with the page's colours and fonts, and with ids of its own."""
    root = ElementTree.fromstring(svg)
    for size in ("width", "height"):
        del root.attrib[size]
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{{{SVG}}}metadata", f"{{{SVG}}}style"):
                parent.remove(child)
        for key, value in parent.attrib.items():
            parent.set(key, _attribute(key, value, name))
    root.set("aria-hidden", "true")  # the caption says what it shows
    return ElementTree.tostring(root, encoding="unicode")


def _attribute(key: str, value: str, name: str) -> str:
    if key == "id":
        return f"{name}-{value}"
    if key in ("d", "x", "y", "transform"):
        value = re.sub(r"\d+\.\d{3,}", lambda number: f"{float(number[0]):.2f}".rstrip("0").rstrip("."), value)
        return " ".join(value.split())
    for colour, stand_in in COLOURS.items():
        value = value.replace(stand_in, f"var(--{colour})")
    value = re.sub(r"font-family: [^;]*; ?", "", value)
    return re.sub(r"(^#|url\(#)", rf"\1{name}-", value) if "#" in value and not value.startswith("data:") else value


def widths(name: str, kept: Mapping[int, int], full: int) -> str:
    """How many units of one kind each layer keeps, as bars."""
    with _drawing(name) as (axes, svg):
        layers = list(kept)
        bar = {"width": 0.82, "linewidth": 0}
        axes.bar(layers, [kept[layer] for layer in layers], color=KEPT, label="kept", **bar)
        axes.bar(
            layers,
            [full - kept[layer] for layer in layers],
            bottom=[kept[layer] for layer in layers],
            color=REMOVED,
            alpha=0.35,
            label="removed",
            **bar,
        )
        axes.set(xlabel="layer", ylabel="units", ylim=(0, full))
        axes.grid(False, axis="x")
        _whole_numbers(axes.xaxis)
        _whole_numbers(axes.yaxis)
        _legend(axes)
    return svg[0]


def scores(name: str, choices: Mapping[int, Choice]) -> str:
    """The distribution of the scores in each layer about its cut: one row per layer."""
    axis = next(iter(choices.values())).axis
    rows = _spread([(layer, choice) for layer, choice in choices.items() if choice.axis == axis])
    step = RANGES[axis] / BINS
    edges = [(number - BINS) * step for number in range(2 * BINS + 1)]
    with _drawing(name, 1.0 + max(0.15 * len(rows), min(0.26 * len(rows), 1.2))) as (axes, svg):
        tallest = 0.85 if len(rows) <= FEW_ROWS else 1.25
        for row, (_, choice) in enumerate(rows):
            most = max(*choice.kept_counts, *choice.removed_counts, 1)
            for counts, colour in ((choice.removed_counts, REMOVED), (choice.kept_counts, KEPT)):
                if not any(counts):
                    continue
                filled = [place for place, count in enumerate(counts) if count]
                some = slice(filled[0], filled[-1] + 1)
                heights = [row - tallest * count / most for count in counts[some]]
                look = {"facecolor": colour, "edgecolor": CARD, "linewidth": 0.7, "alpha": 1}
                axes.stairs(
                    heights, edges[some.start : some.stop + 1], baseline=row, fill=True, zorder=row + 2, **look
                )
        used = [
            edge
            for _, choice in rows
            for place, pair in enumerate(zip(choice.kept_counts, choice.removed_counts, strict=True))
            if any(pair)
            for edge in edges[place : place + 2]
        ]
        axes.axvline(0, color=INK, linewidth=1.2, zorder=len(rows) + 3)
        axes.set(
            xlim=(min(-1.0, *used), max(1.0, *used)), ylim=(len(rows) - 0.6, -1.1 * tallest - 0.1), ylabel="layer"
        )
        axes.set_yticks(range(len(rows)), [str(layer) for layer, _ in rows], fontsize=7.5)
        axes.grid(False, axis="y")
        axes.tick_params(axis="y", length=0)
        _score_ticks(axes, axis)
        _patches(axes, {"removed": REMOVED, "kept": KEPT})
    return svg[0]


def _score_ticks(axes: Any, axis: str) -> None:
    low, high = axes.get_xlim()
    if axis == "deviation":
        axes.set_xlabel("score, in standard deviations from the cut")
        return
    step = 1 if high - low <= 6 else 2
    powers = [power for power in range(-6, 7) if low <= power <= high and power % step == 0]
    names = ["cut" if power == 0 else f"× {2**power}" if power > 0 else f"1/{2**-power}" for power in powers]
    axes.set_xticks(powers, names)
    axes.set_xlabel("score of a unit, as a multiple of the cut")


def ratios(name: str, perplexities: Mapping[str, Mapping[str, float]], marks: Sequence[str]) -> str:
    """Perplexities as multiples of the dense model's, by domain."""
    forms = {"pruned": ("o", REMOVED), "recovered": ("D", RECOVERED)}
    with _drawing(name, 1.0 + 0.26 * max(len(perplexities), 2)) as (axes, svg):
        for row, values in enumerate(perplexities.values()):
            points = [values[mark] / values["dense"] for mark in marks]
            axes.plot([1.0, *points], [row] * (len(points) + 1), color=MUTED, linewidth=1, zorder=2)
        for mark in marks:
            form, colour = forms[mark]
            points = [values[mark] / values["dense"] for values in perplexities.values()]
            axes.plot(points, range(len(points)), form, color=colour, label=mark, zorder=3, markersize=6.5)
        axes.axvline(1.0, color=INK, linewidth=1.2, label="dense")
        shown = [value / values["dense"] for values in perplexities.values() for value in values.values()]
        if max(shown) > WIDE * min(shown):
            axes.set_xscale("log")
            _plain_powers(axes.xaxis)
        axes.set(xlabel="perplexity, as a multiple of the dense model's", ylim=(len(perplexities) - 0.5, -0.5))
        axes.set_yticks(range(len(perplexities)), list(map(_short, perplexities)))
        axes.grid(False, axis="y")
        axes.margins(x=0.08)
        _legend(axes)
    return svg[0]


def agreement(name: str, domains: Sequence[str], choices: Mapping[int, Choice]) -> str:
    """The rank correlation of what units carry, of pairs of domains by layer, as a heat map."""
    labels, rows = _pairs(domains, [choice.agreement for choice in choices.values()])
    values = [value for row in rows for value in row]
    with _drawing(name, 1.0 + 0.24 * max(len(rows), 3)) as (axes, svg):
        image = axes.imshow(rows, aspect="auto", cmap="cividis", vmin=min(0.0, *values), vmax=1, interpolation="none")
        axes.set_yticks(range(len(labels)), labels)
        layers = list(choices)
        every = -(-len(layers) // 10)
        axes.set_xticks(range(0, len(layers), every), list(map(str, layers[::every])))
        axes.set_xlabel("layer")
        axes.grid(False)
        axes.tick_params(length=0)
        bar = axes.figure.colorbar(image, ax=axes, fraction=0.05, pad=0.02)
        bar.outline.set_visible(False)
        bar.ax.tick_params(length=0)
    return svg[0]


def _pairs(domains: Sequence[str], by_layer: Sequence[Sequence[float]]) -> tuple[list[str], list[list[float]]]:
    """The rows of the heat map: pairs of domains, or with many domains each one in the mean over the others."""
    pairs = [(a, b) for a in range(len(domains)) for b in range(a + 1, len(domains))]
    if len(pairs) <= MOST_PAIRS:
        longest = LONGEST // 2 + 1
        labels = [f"{_short(domains[a], longest)} – {_short(domains[b], longest)}" for a, b in pairs]
        return labels, [list(row) for row in zip(*by_layer, strict=True)]
    rows = [
        [fmean(value for pair, value in zip(pairs, values, strict=True) if one in pair) for values in by_layer]
        for one in range(len(domains))
    ]
    return list(map(_short, domains)), rows


def errors(name: str, choices: Mapping[int, Choice]) -> str:
    """The error of the consumers' output without and with the refit, by layer."""
    layers = list(choices)
    before, after = ([choice.error[which] for choice in choices.values()] for which in (0, 1))
    with _drawing(name) as (axes, svg):
        axes.vlines(layers, after, before, color=MUTED, linewidth=1)
        axes.plot(layers, before, "o", color=REMOVED, label="without refit")
        axes.plot(layers, after, "D", color=KEPT, label="with refit")
        axes.set(xlabel="layer", ylabel="error / output")
        axes.set_ylim(bottom=0)
        axes.margins(x=0.04)
        _whole_numbers(axes.xaxis)
        _legend(axes)
    return svg[0]


def losses(name: str, trials: Mapping[int, Mapping[int, Sequence[float]]], full: int) -> str:
    """The measured loss of the model with a part of one layer's units removed, by layer: the mean over the domains,
    and the range from the least to the most.
    """
    layers = list(trials)
    removed = sorted({units for by_units in trials.values() for units in by_units})
    looks = (("o-", KEPT), ("s--", REMOVED), ("D:", RECOVERED))
    with _drawing(name) as (axes, svg):
        for units, (form, colour) in zip(removed, looks, strict=False):
            there = [layer for layer in layers if trials[layer].get(units)]
            means = [fmean(trials[layer][units]) for layer in there]
            axes.plot(there, means, form, color=colour, label=f"{units / full:.0%} removed")
            ends = ([end(trials[layer][units]) for layer in there] for end in (min, max))
            axes.fill_between(there, *ends, color=colour, alpha=0.18, linewidth=0)
        if all(value > 0 for by_units in trials.values() for values in by_units.values() for value in values):
            axes.set_yscale("log")
            _plain_powers(axes.yaxis)
        axes.set(xlabel="layer", ylabel="KL from dense, nats")
        _whole_numbers(axes.xaxis)
        _legend(axes)
    return svg[0]


def seconds(name: str, stages: Mapping[str, float]) -> str:
    """The time of each stage, as bars."""
    with _drawing(name, 0.6 + 0.24 * max(len(stages), 3)) as (axes, svg):
        axes.barh(range(len(stages)), list(stages.values()), color=KEPT, height=0.7)
        axes.set_yticks(range(len(stages)), list(map(_short, stages)))
        axes.set(xlabel="seconds", ylim=(len(stages) - 0.5, -0.5))
        axes.grid(False, axis="y")
    return svg[0]


def _spread(rows: Sequence[Any]) -> list[Any]:
    """At most `MOST_ROWS` of the rows, evenly spread."""
    every = -(-len(rows) // MOST_ROWS)
    return list(rows[:: max(every, 1)])


def _short(name: str, longest: int = LONGEST) -> str:
    return name if len(name) <= longest else f"{name[: longest - 1]}…"


def _whole_numbers(axis: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=True, nbins=8, min_n_ticks=1))


def _plain_powers(axis: Any) -> None:
    """Ticks of a logarithmic axis as plain numbers."""
    from matplotlib.ticker import LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda value, _: f"{value:g}")


def _legend(axes: Any) -> None:
    axes.figure.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=3)


def _patches(axes: Any, colours: Mapping[str, str]) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(color=colour, label=label) for label, colour in colours.items()]
    axes.figure.legend(handles=handles, loc="outside upper left", ncols=3)
