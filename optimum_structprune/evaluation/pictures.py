"""Pictures of quality against size, drawn by matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from ..errors import StructPruneError


SUFFIXES = (".svg", ".png", ".pdf")
# Colours that the colour-blind tell apart (Okabe & Ito 2008).
BLUE, ORANGE = "#0072B2", "#D55E00"


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


@dataclass(frozen=True)
class Point:
    """One model in a picture.

    Attributes:
        name: What stands beside the point.
        size: The place on the horizontal axis.
        quality: The place on the vertical axis.
    """

    name: str
    size: float
    quality: float


def check_picture(path: str | Path) -> None:
    """Refuse a picture that cannot be drawn, before anything is measured for it."""
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise StructPruneError(f"{path} has to end in one of {', '.join(SUFFIXES)} to be a picture.")
    if not path.absolute().parent.is_dir():
        raise StructPruneError(f"{path} cannot be written: there is no folder {path.parent}.")
    if not can_draw():
        raise StructPruneError("Pictures need matplotlib: pip install matplotlib")


def front(points: Sequence[Point], higher_is_better: bool = False) -> list[Point]:
    """The points that no other one beats in size and quality at once, from the smallest on (the Pareto front)."""
    sign = -1 if higher_is_better else 1
    best: list[Point] = []
    for point in sorted(points, key=lambda point: (point.size, sign * point.quality)):
        if not best or sign * point.quality < sign * best[-1].quality:
            best.append(point)
    return best


def draw_quality(
    path: str | Path,
    points: Sequence[Point],
    size: str = "parameters",
    quality: str = "perplexity",
    higher_is_better: bool = False,
) -> None:
    """Draw models by size and quality, and join those that no other one beats in both."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    best = front(points, higher_is_better)
    # The same numbers give the same file, and its text stays text.
    with rc_context({"svg.hashsalt": "structprune", "svg.fonttype": "none"}):
        figure = Figure(figsize=(7, 4.5), layout="constrained")
        axes = figure.add_subplot()
        axes.plot([p.size for p in best], [p.quality for p in best], color=BLUE, linewidth=1.5, zorder=1)
        for point in points:
            color, marker = (BLUE, "o") if point in best else (ORANGE, "s")
            axes.scatter(point.size, point.quality, color=color, marker=marker, zorder=2)
            axes.annotate(point.name, (point.size, point.quality), xytext=(5, 5), textcoords="offset points")
        axes.set(xlabel=size, ylabel=quality)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.margins(0.2)
        axes.grid(alpha=0.3)
        try:
            figure.savefig(path, metadata={"Date": None} if str(path).endswith(".svg") else None)
        except OSError as error:
            raise StructPruneError(f"{path} cannot be written: {error.strerror}.") from error
