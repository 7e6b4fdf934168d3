"""The curve of quality against size that a sweep gives, kept on disk after every size."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from ..config.fields import read_mapping
from ..errors import StructPruneError
from ..plain_json import to_json
from ..record.report import Report
from ..record.text import table
from .pictures import Point, can_draw, draw_quality
from .side_by_side import Value, as_csv


CURVE = "curve.json"
VERSION = 1


@dataclass(frozen=True)
class Size:
    """A model that was pruned to one size.

    Attributes:
        sparsity: The share of the layers' parameters that was asked to go.
        reached: The share that has gone.
        parameters: The number of parameters.
        loss: By domain, what held-out text says: the perplexity, `{"before": …, "after": …}`, or for a model that does
            not predict the next token, the error of its output, `{"error": …}`.
        widths: The width by space and layer.
        seconds: The time that it took.
    """

    sparsity: float
    reached: float
    parameters: int
    loss: Mapping[str, Mapping[str, float]]
    widths: Mapping[str, Mapping[str, int]]
    seconds: float

    @classmethod
    def of(cls, sparsity: float, report: Report, seconds: float) -> Size:
        """What a run has reached."""
        loss: dict[str, dict[str, float]] = {name: dict(values) for name, values in report.perplexity.items()}
        for name, values in ({} if report.recovery is None else report.recovery.perplexity).items():
            before = values["dense"] if "dense" in values else loss[name]["before"]
            loss[name] = {"before": before, "after": values["recovered"]}
        loss |= {name: {"error": error} for name, error in report.output_error.items()}
        widths = {name: {str(layer): width for layer, width in of.items()} for name, of in report.widths.items()}
        return cls(sparsity, report.sparsity, report.parameters["after"], loss, widths, seconds)

    @property
    def quality(self) -> float:
        """The geometric mean of the losses over the domains."""
        return geometric_mean(values.get("after", values.get("error", 0.0)) for values in self.loss.values())

    def row(self) -> dict[str, Value]:
        """The size as one line of a table, by column."""
        row: dict[str, Value] = {
            "sparsity": self.sparsity,
            "reached": round(self.reached, 4),
            "parameters": self.parameters,
        }
        for name, values in self.loss.items():
            row |= {f"{name} {when}": value for when, value in values.items()}
        return {**row, "geometric mean": self.quality, "seconds": round(self.seconds, 1)}


@dataclass
class Curve:
    """The sizes of a sweep.

    Attributes:
        model: The name or the folder of the dense model.
        settings: How it was pruned, but for how much.
        sizes: The sizes so far, in the order of what was asked for.
    """

    model: str
    settings: Mapping[str, Any]
    sizes: list[Size] = field(default_factory=list)

    @classmethod
    def resume(cls, folder: Path, model: str, settings: Mapping[str, Any]) -> Curve:
        """The curve that a folder holds; one without sizes where it holds nothing."""
        path, settings = folder / CURVE, json.loads(to_json(settings))
        if not path.is_file():
            if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
                raise StructPruneError(f"{folder} holds something else than a sweep; name another output folder.")
            return cls(model, settings)
        data = read_mapping(path, json.loads)
        try:
            if data["version"] != VERSION:
                raise ValueError(f"version {data['version']} where {VERSION} is read")
            found = cls(data["model"], data["settings"], [Size(**size) for size in data["sizes"]])
            differ = [name for name in settings if settings[name] != found.settings.get(name)]
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise StructPruneError(f"{path} holds no sweep ({error}); name another output folder.") from error
        if found.model != model or differ:
            what = f"of {found.model}" if found.model != model else f"with another {', '.join(differ)}"
            raise StructPruneError(f"{folder} holds a sweep {what}; name another output folder, or remove it.")
        return found

    def add(self, size: Size) -> None:
        """Enter a size in place of an earlier one of the same sparsity."""
        others = [other for other in self.sizes if other.sparsity != size.sparsity]
        self.sizes = sorted([*others, size], key=lambda size: size.sparsity)

    def save(self, folder: Path) -> None:
        """Write `curve.json`, `curve.csv`, and where matplotlib is installed, `curve.svg`."""
        rows = [size.row() for size in self.sizes]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{CURVE}.new").write_text(to_json({"version": VERSION, **self.to_dict()}) + "\n")
            (folder / f"{CURVE}.new").replace(folder / CURVE)
            (folder / "curve.csv").write_text(as_csv(rows))
        except OSError as error:
            raise StructPruneError(f"The curve cannot be written to {folder}: {error.strerror}.") from error
        if can_draw():
            draw_quality(folder / "curve.svg", self.points(), quality=self.quality)

    @property
    def quality(self) -> str:
        """What the curve shows."""
        return "perplexity" if "after" in next(iter(self.sizes[0].loss.values()), {}) else "output error"

    def points(self) -> list[Point]:
        """The sizes by parameters and quality."""
        return [Point(f"{size.sparsity:g}", size.parameters, size.quality) for size in self.sizes]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return asdict(self)

    def __str__(self) -> str:
        """One line for each size."""
        rows = [["sparsity", "parameters", *self.sizes[0].loss, "geometric mean", "seconds"]]
        for size in self.sizes:
            losses = (f"{values.get('after', values.get('error', 0.0)):.3f}" for values in size.loss.values())
            rows.append([f"{size.sparsity:g}", f"{size.parameters:,}", *losses, f"{size.quality:.3f}"])
            rows[-1].append(f"{size.seconds:.0f}")
        return f"{self.quality} on held-out text\n{table(rows)}"
