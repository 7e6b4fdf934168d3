"""Draw the picture of the README from the tables of docs/benchmarks.md: quality against size, and beside other tools.

    python examples/benchmarks/draw_quality.py [--page docs/benchmarks.md] [--output docs/pictures/quality.svg]

The SVG takes the light or dark colours of whoever looks at it.
"""

from __future__ import annotations

import re
from argparse import ArgumentParser
from io import StringIO
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure


ROOT = Path(__file__).parents[2]
# What stands for a colour while drawing, the name of its variable, and its value on a light and on a dark card.
COLOURS = {
    "#010101": ("ink", "#24292f", "#e6edf3"),
    "#020202": ("line", "#afb8c1", "#484f58"),
    "#030303": ("ours", "#0072b2", "#56b4e9"),
    "#040404": ("flap", "#d55e00", "#f0883e"),
    "#050505": ("taylor", "#6e7781", "#9aa4ae"),
    "#060606": ("card", "#ffffff", "#161b22"),
}
INK, LINE, OURS, FLAP, TAYLOR, CARD = COLOURS
SIZES = "## The present defaults"
# What each share of the FFN channels of SmolLM2-135M is of all its parameters, in percent.
OF_ALL = {0: 0, 20: 12, 35: 21, 50: 30}
CURVES = {"defaults": ("this package", OURS, "o-"), "FLAP": ("FLAP", FLAP, "s--")}
TOOLS = "## Beside other tools"
BARS = {
    "optimum-structprune, defaults": "this package",
    "optipfair, MAW with data": "OptiPFair, with data",
    "amd-quark, OSSCAR (default)": "AMD Quark",
    "torch-pruning, GroupTaylor": "Torch-Pruning, Taylor",
    "optipfair, MAW (default)": "OptiPFair, its default",
    "torch-pruning, GroupMagnitude (default)": "Torch-Pruning, its default",
}
WIDEST = 3.0  # multiples that are larger leave the picture


def tables(page: str, heading: str) -> list[dict[str, dict[str, str]]]:
    """The Markdown tables under a heading, each as rows by their first cell, and these as cells by their column."""
    section = re.split(r"^#+ ", page.partition(f"\n{heading}\n")[2], maxsplit=1, flags=re.MULTILINE)[0]
    found = []
    for block in re.findall(r"(?:^\|.*\n)+", section, re.MULTILINE):
        head, _, *rows = ([cell.strip() for cell in line.strip("|\n").split("|")] for line in block.splitlines(True))
        found.append({row[0]: dict(zip(head, row, strict=True)) for row in rows})
    return found


def curves(page: str) -> dict[str, dict[int, float]]:
    """The multiples of the dense perplexity on held-out text, by label and share of the channels."""
    (table,) = tables(page, SIZES)
    names = {share: f"SmolLM2-135M, {share} %" for share in OF_ALL}
    rows = {method: {share: table.get(f"{name}, {method}") for share, name in names.items()} for method in CURVES}
    return {
        label: {0: 1.0, **{share: float(row["same kinds"].split()[0]) for share, row in rows[method].items() if row}}
        for method, (label, *_) in CURVES.items()
    }


def bars(page: str) -> dict[str, float]:
    """The multiples of the dense perplexity on held-out text, by tool."""
    (table,) = tables(page, TOOLS)
    return {
        label: float(re.findall(r"\(([\d,.]+)\)", table[row]["held-out"])[0].replace(",", ""))
        for row, label in BARS.items()
    }


def draw_curves(axes: Axes, page: str) -> None:
    """Quality against size."""
    for (label, points), (_, colour, style) in zip(curves(page).items(), CURVES.values(), strict=True):
        axes.plot([*points], [*points.values()], style, color=colour, label=label, gid=f"curve {label}")
        axes.annotate(f"{points[50]:.2f}", (50, points[50]), (5, -3), textcoords="offset points", color=colour)
    axes.set(yscale="log", xlim=(-2, 57), ylim=(0.9, 13), xlabel="% removed of the FFN channels (of all parameters)")
    axes.set_xticks([*OF_ALL], [f"{share} ({of_all})" for share, of_all in OF_ALL.items()])
    axes.set_yticks([1, 2, 4, 8], ["1 ×", "2 ×", "4 ×", "8 ×"])
    axes.minorticks_off()
    axes.grid(axis="y")
    axes.set_title("against size, 128 samples")
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(0, 0.82), labelcolor=INK)  # between two lines


def draw_bars(axes: Axes, page: str) -> None:
    """Quality beside other tools, at one size."""
    for place, (label, multiple) in enumerate(bars(page).items()):
        colour = OURS if place == 0 else TAYLOR
        axes.barh(place, min(multiple, WIDEST) - 1, left=1, height=0.6, color=colour, gid=f"bar {label}")
        beyond = " →" if multiple > WIDEST else ""
        axes.annotate(
            f"{multiple:,.{0 if beyond else 2}f} ×{beyond}",
            (min(multiple, WIDEST), place),
            (4, -3),
            textcoords="offset points",
        )
    axes.set(xlim=(1, 3.8), xlabel="35 % of the FFN channels, 21 % of all parameters")
    axes.set_yticks(range(len(BARS)), [*BARS.values()])
    axes.set_xticks([1, 2, 3], ["1 ×", "2 ×", "3 ×"])
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.set_title("beside other tools, 30 samples")


def picture(page: str) -> str:
    """The SVG, with a variable for each colour."""
    text = {f"{name}color": INK for name in ("text.", "axes.label", "axes.title", "xtick.label", "ytick.label")}
    rest = {"axes.edgecolor": LINE, "grid.color": LINE, "axes.spines.top": False, "axes.spines.right": False}
    with matplotlib.rc_context({**text, **rest, "svg.fonttype": "none", "svg.hashsalt": "quality", "font.size": 9}):
        figure = Figure(figsize=(8.6, 3.4), facecolor=CARD)
        left, right = figure.subplots(1, 2)
        figure.subplots_adjust(0.06, 0.15, 0.98, 0.82, wspace=0.5)
        figure.suptitle("Perplexity of SmolLM2-135M after pruning, as a multiple of the dense model's (held-out text)")
        for axes in (left, right):
            axes.set_facecolor("none")
        draw_curves(left, page)
        draw_bars(right, page)
        drawn = StringIO()
        figure.savefig(drawn, format="svg", metadata={"Date": None, "Creator": None})
    svg = drawn.getvalue()
    for placeholder, (name, *_) in COLOURS.items():
        svg = svg.replace(placeholder, f"var(--{name})")
    light, dark = (" ".join(f"--{name}: {pair[which]};" for name, *pair in COLOURS.values()) for which in (0, 1))
    style = f"<style>svg {{ {light} }}\n@media (prefers-color-scheme: dark) {{ svg {{ {dark} }} }}</style>\n"
    return re.sub(r"(<svg [^>]*>\n)", lambda match: match[0] + style, svg, count=1)


def main(argv: list[str] | None = None) -> None:
    """Read the page and write the picture."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "benchmarks.md")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "pictures" / "quality.svg")
    args = parser.parse_args(argv)
    args.output.write_text(picture(args.page.read_text()))


if __name__ == "__main__":
    main()
