"""Draw the pictures of the docs from docs/figures.yaml.

    python examples/benchmarks/draw_pictures.py [--figures docs/figures.yaml] [--output docs/pictures]

`quality.svg` shows the quality by size and against other tools, and `recovery.svg` the quality by training tokens. The
pictures have a light and a dark colour scheme.
"""

from __future__ import annotations

import re
from argparse import ArgumentParser
from collections.abc import Callable, Mapping
from io import StringIO
from pathlib import Path
from typing import Any

import matplotlib
import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure


ROOT = Path(__file__).parents[2]
# A placeholder for each colour while drawing, the name of its variable, and its values in the light and dark scheme.
COLOURS = {
    "#010101": ("ink", "#24292f", "#e6edf3"),
    "#020202": ("line", "#afb8c1", "#484f58"),
    "#030303": ("ours", "#0072b2", "#56b4e9"),
    "#040404": ("flap", "#d55e00", "#f0883e"),
    "#050505": ("taylor", "#6e7781", "#9aa4ae"),
    "#060606": ("card", "#ffffff", "#161b22"),
}
INK, LINE, OURS, FLAP, TAYLOR, CARD = COLOURS
# The share of all parameters for each removed share of the FFN channels of SmolLM2-135M, in percent.
OF_ALL = {0: 0, 20: 12, 35: 21, 50: 30}
# The prefix of the figures of a curve, its colour and its style, by its label.
CURVES = {"this package": ("mlp", OURS, "o-"), "FLAP": ("flap", FLAP, "s--")}
# The figure of a bar, by its label.
BARS = {
    "this package": "peers_ours",
    "OptiPFair, with data": "peers_maw_data",
    "AMD Quark": "peers_quark",
    "Torch-Pruning, Taylor": "peers_taylor",
    "OptiPFair, its default": "peers_maw",
    "Torch-Pruning, its default": "peers_magnitude",
}
# The label of this package.
OUR_LABEL = "this package"
# Larger ratios are cut off.
WIDEST = 3.0
# The figure of each point of the recovery, by its label on the axis.
RECOVERY = {
    "0": "channels10",
    "50,000": "channels10_50k",
    "100,000": "channels10_100k",
    "400,000": "channels10_400k",
    "1,000,000": "channels10_1m",
}
# The field, the colour and the style of a curve of the recovery, by its label.
RECOVERY_CURVES = {"unseen": ("unseen", FLAP, "s--"), "held-out": ("heldout", OURS, "o-")}


def curve(figures: Mapping[str, Mapping[str, Any]], prefix: str) -> dict[int, float]:
    """Return the perplexity on held-out text, relative to the original model, by the removed share of channels."""
    points = {0: 1.0}

    for share in OF_ALL:
        if share:
            points[share] = figures[f"{prefix}{share}"]["heldout"]

    return points


def draw_curves(axes: Axes, figures: Mapping[str, Mapping[str, Any]]) -> None:
    """Draw quality against size."""
    for label, (prefix, colour, style) in CURVES.items():
        points = curve(figures, prefix)
        axes.plot(list(points), list(points.values()), style, color=colour, label=label, gid=f"curve {label}")
        axes.annotate(f"{points[50]:.2f}", (50, points[50]), (5, -3), textcoords="offset points", color=colour)

    axes.set(yscale="log", xlim=(-2, 57), ylim=(0.9, 13), xlabel="% removed of the FFN channels (of all parameters)")
    axes.set_xticks(list(OF_ALL), [f"{share} ({of_all})" for share, of_all in OF_ALL.items()])
    axes.set_yticks([1, 2, 4, 8], ["1×", "2×", "4×", "8×"])
    axes.minorticks_off()
    axes.grid(axis="y")
    axes.set_title("by size, 128 samples")
    # The legend is between two grid lines.
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(0, 0.82), labelcolor=INK)


def draw_bars(axes: Axes, figures: Mapping[str, Mapping[str, Any]]) -> None:
    """Draw quality against other tools at one size."""
    for place, (label, name) in enumerate(BARS.items()):
        ratio = figures[name]["heldout"]
        width = min(ratio, WIDEST)
        text = f"{ratio:.2f}×"
        if ratio > WIDEST:
            text = f"{ratio:,.0f}× →"
        colour = TAYLOR
        if label == OUR_LABEL:
            colour = OURS

        axes.barh(place, width - 1, left=1, height=0.6, color=colour, gid=f"bar {label}")
        axes.annotate(text, (width, place), (4, -3), textcoords="offset points")

    axes.set(xlim=(1, 3.8), xlabel="35% of the FFN channels, 21% of all parameters")
    axes.set_yticks(range(len(BARS)), list(BARS))
    axes.set_xticks([1, 2, 3], ["1×", "2×", "3×"])
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.set_title("against other tools, 30 samples")


def draw_quality(figure: Figure, figures: Mapping[str, Mapping[str, Any]]) -> None:
    """Draw the quality by size and against other tools."""
    left, right = figure.subplots(1, 2)
    figure.subplots_adjust(0.06, 0.15, 0.98, 0.82, wspace=0.5)
    figure.suptitle("Perplexity of SmolLM2-135M after pruning, relative to the original model (held-out text)")
    left.set_facecolor("none")
    right.set_facecolor("none")
    draw_curves(left, figures)
    draw_bars(right, figures)


def draw_recovery(figure: Figure, figures: Mapping[str, Mapping[str, Any]]) -> None:
    """Draw perplexity by the number of training tokens."""
    axes = figure.subplots()
    figure.subplots_adjust(0.06, 0.15, 0.98, 0.82, wspace=0.25)
    figure.suptitle("Recovery of SmolLM2-135M without 17% of its FFN channels")
    points = [figures[name] for name in RECOVERY.values()]

    for label, (field, colour, style) in RECOVERY_CURVES.items():
        ratios = [point[field] for point in points]
        axes.plot(range(len(ratios)), ratios, style, color=colour, label=label, gid=f"curve {label}")
        for place, ratio in enumerate(ratios):
            axes.annotate(
                f"{ratio:.3f}", (place, ratio), (0, 6), textcoords="offset points", color=colour, ha="center"
            )

    axes.set(xlim=(-0.3, 3.3), ylim=(1, 1.5), xlabel="training tokens")
    axes.set_yticks([1, 1.2, 1.4], ["1×", "1.2×", "1.4×"])
    axes.grid(axis="y")
    axes.set_title("perplexity, relative to the original model")
    axes.legend(frameon=False, loc="lower left", labelcolor=INK)

    axes.set_facecolor("none")
    axes.set_xticks(range(len(RECOVERY)), list(RECOVERY))


def picture(figures: Mapping[str, Mapping[str, Any]], draw: Callable[..., None]) -> str:
    """Return an SVG, with a variable for each colour."""
    settings: dict[str, Any] = {
        "axes.edgecolor": LINE,
        "grid.color": LINE,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "svg.fonttype": "none",
        "svg.hashsalt": "quality",
        "font.size": 9,
    }
    for name in ("text.", "axes.label", "axes.title", "xtick.label", "ytick.label"):
        settings[f"{name}color"] = INK

    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(8.6, 3.4), facecolor=CARD)
        draw(figure, figures)
        drawing = StringIO()
        figure.savefig(drawing, format="svg", metadata={"Date": None, "Creator": None})

    svg = drawing.getvalue()
    for placeholder, (name, _, _) in COLOURS.items():
        svg = svg.replace(placeholder, f"var(--{name})")

    light = " ".join(f"--{name}: {value};" for name, value, _ in COLOURS.values())
    dark = " ".join(f"--{name}: {value};" for name, _, value in COLOURS.values())
    style = f"<style>svg {{ {light} }}\n@media (prefers-color-scheme: dark) {{ svg {{ {dark} }} }}</style>\n"
    return re.sub(r"(<svg [^>]*>\n)", lambda match: match[0] + style, svg, count=1)


PICTURES = {"quality.svg": draw_quality, "recovery.svg": draw_recovery}


def main(argv: list[str] | None = None) -> None:
    """Read the figures and write the pictures."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--figures", type=Path, default=ROOT / "docs" / "figures.yaml")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "pictures", help="the folder of the pictures")

    args = parser.parse_args(argv)

    figures = yaml.safe_load(args.figures.read_text())["figures"]
    for name, draw in PICTURES.items():
        (args.output / name).write_text(picture(figures, draw))


if __name__ == "__main__":
    main()
